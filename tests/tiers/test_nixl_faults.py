"""What happens to the nixl tier when its pool is cut, flipped, deleted, taken by another or out of disk."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
from remote_objects import HANG_S, NOBODY, blank, holds, made, opened, size
from stores.nixl import REQUIRES

from lmcache.errors import ConfigError, TierError
from lmcache.tiers import make_tier, objects
from lmcache.tiers.base import Share, Tier
from lmcache.tiers.nixl_pool import FILE_NAME, HEADER_MAX

pytest.importorskip(REQUIRES[0])

SLOT_BYTES = (1 << 20) + HEADER_MAX
TENANT = b"t" * 16


def run(main: Coroutine[Any, Any, None]) -> None:
    """A test's body, which may not hang."""
    asyncio.run(asyncio.wait_for(main, HANG_S))


def options(folder: Path, **more: object) -> dict[str, object]:
    return {"type": "nixl", "base_path": str(folder), "pool_size": 4, "slot_mb": 1, **more}


def test_objects_and_their_number_are_there_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        kept = [made(index) for index in range(3)]
        async with opened(options(tmp_path)) as tier:
            assert [await tier.put(*one, NOBODY) for one in kept] == [True] * 3
            await tier.delete([kept[1][0]])
        async with opened(options(tmp_path)) as tier:
            usage = await tier.usage()
            assert (usage.num_objects, usage.num_slots) == (2, 4)
            assert usage.used_bytes == 2 * size(kept[0][1])
            assert usage.tenant_bytes == {bytes(16): 2 * size(kept[0][1])}
            assert [await holds(tier, *one) for one in kept] == [True, False, True]

    run(main())


def test_a_full_pool_ends_what_was_used_longest_ago(tmp_path: Path) -> None:
    async def main() -> None:
        one = [made(index) for index in range(5)]
        async with opened(options(tmp_path)) as tier:
            for index in range(4):
                assert await tier.put(*one[index], NOBODY)
            assert await holds(tier, *one[0])
            assert await tier.put(*one[4], NOBODY)
            assert [await holds(tier, *each) for each in one] == [True, False, True, True, True]
            assert (await tier.usage()).num_evicted == 1
        async with opened(options(tmp_path)) as tier:
            assert [await holds(tier, *each) for each in one] == [True, False, True, True, True]

    run(main())


def test_a_tenant_over_its_limit_loses_its_own_oldest_and_nobody_elses(tmp_path: Path) -> None:
    async def main() -> None:
        others = made("others")
        mine = [made(index, tenant=TENANT) for index in range(3)]
        each = size(mine[0][1])
        async with opened(options(tmp_path)) as tier:
            assert await tier.put(*others, NOBODY)
            for one in mine:
                assert await tier.put(*one, Share(TENANT, 2 * each))
            assert [await holds(tier, *one) for one in (others, *mine)] == [True, False, True, True]
            assert (await tier.usage()).tenant_bytes == {bytes(16): each, TENANT: 2 * each}
            assert not await tier.put(*made("large", tenant=TENANT), Share(TENANT, each - 1))

    run(main())


@pytest.mark.parametrize("seed", range(3))
def test_calls_in_any_order_at_once_never_give_other_bytes(tmp_path: Path, seed: int) -> None:
    """Twelve keys in a pool of four slots; each key has one call at a time, as the framework guarantees."""
    dice = random.Random(seed)
    newest: dict[int, tuple[bytes, list[memoryview]]] = {}
    hits = 0

    async def of_one_key(tier: Tier, index: int) -> None:
        nonlocal hits
        for _ in range(60):
            verb = dice.choice(["put", "put", "get", "get", "get", "delete"])
            if verb == "put":
                one = made(index, tenant=TENANT if index % 2 else bytes(16))
                limit = 2 * size(one[1]) if index % 2 else None
                if await tier.put(*one, Share(TENANT if index % 2 else bytes(16), limit)):
                    newest[index] = one
            elif verb == "delete":
                await tier.delete([made(index)[0]])
                newest.pop(index, None)
            elif index in newest:
                hits += await holds(tier, *newest[index])
            usage = await tier.usage()
            assert (usage.num_objects or 0) <= 4
            assert (usage.tenant_bytes or {}).get(TENANT, 0) <= 2 * size(made(index)[1])

    async def main() -> None:
        async with opened(options(tmp_path)) as tier:
            await asyncio.gather(*(of_one_key(tier, index) for index in range(12)))
            keys = [made(index)[0] for index in range(12)]
            before = await tier.contains(keys)
        async with opened(options(tmp_path)) as tier:
            assert await tier.contains(keys) == before
            for index, one in newest.items():
                assert await holds(tier, *one) == bool(before[index])
        assert hits > 20

    run(main())


def test_an_object_larger_than_a_slot_is_refused_with_a_reason(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(options(tmp_path)) as tier:
            assert not await tier.put(*made("large", extent_bytes=1 << 20, ranks=2), NOBODY)
            assert "raise slot_mb" in str((await tier.usage()).problem)
            assert await tier.put(*made("fits", extent_bytes=1 << 20, ranks=1), NOBODY)

    run(main())


@pytest.mark.parametrize("where", ["before the scan", "after it"])
def test_a_cut_file_loses_the_objects_behind_the_cut_and_no_others(tmp_path: Path, where: str) -> None:
    async def main() -> None:
        kept = [made(index, extent_bytes=256 << 10) for index in range(3)]
        async with opened(options(tmp_path)) as tier:
            for one in kept:
                assert await tier.put(*one, NOBODY)
            if where == "after it":
                os.truncate(tmp_path / FILE_NAME, SLOT_BYTES + 4096)
                assert [await holds(tier, *one) for one in kept] == [True, False, False]
                assert await tier.contains([key for key, _ in kept]) == [size(kept[0][1]), 0, 0]
                assert await tier.put(*kept[1], NOBODY)
                assert await holds(tier, *kept[1])
                return
        os.truncate(tmp_path / FILE_NAME, SLOT_BYTES + 4096)
        async with opened(options(tmp_path)) as tier:
            assert [await holds(tier, *one) for one in kept] == [True, False, False]

    run(main())


@pytest.mark.parametrize("where", ["before the scan", "after it"])
def test_a_flipped_bit_in_a_header_is_a_miss(tmp_path: Path, where: str) -> None:
    def flip() -> None:
        with (tmp_path / FILE_NAME).open("r+b", buffering=0) as file:
            file.seek(SLOT_BYTES + 40)
            byte = file.read(1)
            file.seek(SLOT_BYTES + 40)
            file.write(bytes([byte[0] ^ 4]))

    async def main() -> None:
        kept = [made(index) for index in range(3)]
        async with opened(options(tmp_path)) as tier:
            for one in kept:
                assert await tier.put(*one, NOBODY)
            if where == "after it":
                flip()
                assert [await holds(tier, *one) for one in kept] == [True, False, True]
        if where == "before the scan":
            flip()
        async with opened(options(tmp_path)) as tier:
            assert [await holds(tier, *one) for one in kept] == [True, False, True]
            assert await tier.put(*kept[1], NOBODY)
            assert await holds(tier, *kept[1])

    run(main())


def test_two_swapped_slots_are_misses_and_are_found_again_after_a_restart(tmp_path: Path) -> None:
    async def main() -> None:
        kept = [made(index) for index in range(2)]
        async with opened(options(tmp_path)) as tier:
            for one in kept:
                assert await tier.put(*one, NOBODY)
            with (tmp_path / FILE_NAME).open("r+b", buffering=0) as file:
                first, second = file.read(SLOT_BYTES), file.read(SLOT_BYTES)
                file.seek(0)
                file.write(second + first)
            assert [await holds(tier, *one) for one in kept] == [False, False]
        async with opened(options(tmp_path)) as tier:
            assert [await holds(tier, *one) for one in kept] == [True, True]

    run(main())


def test_nonsense_in_place_of_the_pool_holds_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / FILE_NAME).write_bytes(objects.MAGIC + os.urandom(3 * SLOT_BYTES))
        async with opened(options(tmp_path)) as tier:
            assert (await tier.usage()).num_objects == 0
            for index in range(4):
                assert await tier.put(*made(index), NOBODY)

    run(main())


def test_a_deleted_folder_is_made_anew_at_the_next_put(tmp_path: Path) -> None:
    async def main() -> None:
        folder = tmp_path / "pool"
        async with opened(options(folder)) as tier:
            lost = made("lost")
            assert await tier.put(*lost, NOBODY)
            shutil.rmtree(folder)
            kept = made("kept")
            assert await tier.put(*kept, NOBODY)
            assert [await holds(tier, *one) for one in (lost, kept)] == [False, True]
        async with opened(options(folder)) as tier:
            assert await holds(tier, *kept)

    run(main())


def test_a_folder_that_cannot_be_made_is_one_sentence_and_works_when_it_can(tmp_path: Path) -> None:
    async def main() -> None:
        (tmp_path / "pool").write_text("in the way")
        tier = make_tier(options(tmp_path / "pool"))
        try:
            with pytest.raises(TierError, match="cannot be opened: File exists"):
                await tier.open()
            (tmp_path / "pool").unlink()
            await tier.open()
            assert await tier.put(*made("first"), NOBODY)
        finally:
            await tier.close()

    run(main())


def test_a_second_server_does_not_get_the_pool_of_the_first(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(options(tmp_path)) as first:
            second = make_tier(options(tmp_path))
            with pytest.raises(TierError, match="in use by another process"):
                await second.open()
            await second.close()
            assert await first.put(*made("first"), NOBODY)

    run(main())


FULL_DISK = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from remote_objects import NOBODY, holds, made, opened

async def main():
    given = {"type": "nixl", "base_path": sys.argv[2], "pool_size": 64, "slot_mb": 1}
    async with opened(given) as tier:
        answers = [await tier.put(*made(index), NOBODY) for index in range(12)]
        assert answers[:3] == [True] * 3, answers
        assert answers.count(False) == 1, answers
        assert "is full" in (await tier.usage()).problem
        assert await tier.contains([made(0)[0]]) == [0]
        last = made("last")
        assert await tier.put(*last, NOBODY)
        assert await holds(tier, *last)
    async with opened(given) as tier:
        assert await holds(tier, *last)

asyncio.run(main())
print("as expected")
"""


def test_a_full_disk_ends_old_objects_instead_of_growing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    here = str(Path(__file__).parent)
    mounted = f'mount -t tmpfs -o size=8m none "{disk}" && exec "$0" -c "$1" "$2" "$3"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted]
    if subprocess.run([*command[:4], "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces of one's own here")
    done = subprocess.run(
        [*command, sys.executable, FULL_DISK, here, str(disk)],
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.stdout == "as expected\n", done.stderr


ENDLESS = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from remote_objects import NOBODY, made, opened

async def main():
    async with opened({"type": "nixl", "base_path": sys.argv[2], "pool_size": 4, "slot_mb": 1}) as tier:
        for index in range(10**9):
            key, parts = made(index % 7, extent_bytes=256 << 10)
            for rank, part in enumerate(parts[1:]):
                part[:] = bytes([index % 7 * 16 + rank]) * len(part)
            assert await tier.put(key, parts, NOBODY)
            print(index, flush=True)

asyncio.run(main())
"""


def test_a_killed_writer_leaves_whole_objects(tmp_path: Path) -> None:
    async def main() -> None:
        for num_lines in range(3, 23):
            command = [sys.executable, "-c", ENDLESS, str(Path(__file__).parent), str(tmp_path)]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for _ in range(num_lines):
                assert process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            async with opened(options(tmp_path)) as tier:
                num_found = 0
                for index in range(7):
                    key, parts = made(index, extent_bytes=256 << 10)
                    room = blank(parts)
                    if await tier.get(key, room):
                        num_found += 1
                        for rank, part in enumerate(room[1:]):
                            assert part == bytes([index * 16 + rank]) * len(part)
                assert num_found >= 3  # of four slots, one may have been in the writer's hands

    run(main())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"backend": "UCX"}, "moves bytes between machines and stores none"),
        ({"backend": "OBJ"}, "use the type 'object'"),
        ({"backend": "TAPE"}, "'backend' is one of POSIX, GDS, GDS_MT"),
        ({"pool_size": 0}, "'pool_size' is 1 to"),
        ({"slots": 3}, "unknown option 'slots'"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_tier(options(tmp_path, **wrong))


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="this machine may have the backend")
def test_a_backend_that_this_machine_lacks_is_one_sentence(tmp_path: Path) -> None:
    async def main() -> None:
        tier = make_tier(options(tmp_path, backend="GDS"))
        with pytest.raises(TierError, match="no backend 'GDS' here"):
            await tier.open()
        await tier.close()

    run(main())


def test_the_library_does_not_write_to_our_output(tmp_path: Path) -> None:
    program = f"""
import asyncio
from lmcache.tiers import make_tier
tier = make_tier({options(tmp_path)!r})
asyncio.run(tier.open())
asyncio.run(tier.close())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
