"""The file tier when disks, people and other processes misbehave."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_S, run_with_tier
from making import KIB, MIB, Made, Pool, same

from lmcache.errors import TierError
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share, Tier
from lmcache.tiers.objects import PAGE_BYTES

ANYBODY = Share(bytes(16))
HERE = Path(__file__).parent

WRITER = """
import asyncio, random, sys
from making import Pool
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share
async def main():
    tier = make_tier({"type": "file", "base_path": sys.argv[1], "capacity_gb": float(sys.argv[2])})
    await tier.open()
    pool = Pool(8 << 20)
    rooms = [pool.room(4096, 1 << 20) for _ in range(4)]
    number = iter(range(1 << 30))
    async def work(room):
        while True:
            key = sys.argv[3].encode() + next(number).to_bytes(24, "big")
            source = random.Random(key)
            made = Pool(3 << 20).made(1, source.choice([8, 64, 256, 1024]) * 1024, key)
            parts = [part[:len(piece)] for part, piece in zip(room, made.content)]
            content = [made.content[0], source.randbytes(len(made.content[1]))]
            for part, piece in zip(parts, content):
                part[:] = piece
            if await tier.put(key, parts, Share(bytes(16))):
                print(key.hex(), sum(map(len, parts)), flush=True)
    await asyncio.gather(*map(work, rooms))
asyncio.run(main())
"""


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A tier with room for everything that these tests store."""
    return {"type": "file", "base_path": str(tmp_path / "tier"), "capacity_gb": 1}


def file_of(options: dict[str, Any], key: bytes) -> Path:
    """Where an object lies."""
    return Path(options["base_path"]) / "1" / key.hex()[:2] / key.hex()


def capacity_for(count: int, made: Made) -> float:
    """Gigabytes that hold so many objects, and not one more."""
    return (made.num_bytes * count + PAGE_BYTES) / (1 << 30)


async def until(tier: Tier, num_objects: int) -> None:
    """Wait for the look through the folder to have found what is there."""
    deadline = time.monotonic() + HANG_S
    while (await tier.usage()).num_objects != num_objects:
        assert time.monotonic() < deadline, await tier.usage()
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert (await tier.usage()).num_objects == num_objects


async def settled(tier: Tier, folder: Path) -> list[Path]:
    """The objects' files, once the tier knows them all; what was put during the last look may have been too much."""
    deadline = time.monotonic() + HANG_S
    equal = 0
    while equal < 10:
        assert time.monotonic() < deadline, await tier.usage()
        await asyncio.sleep(0.02)
        files = list(folder.glob("1/??/*"))
        equal = equal + 1 if (await tier.usage()).num_objects == len(files) else 0
    return files


def fill(options: dict[str, Any], mades: Sequence[Made]) -> None:
    """Store objects one after the other."""

    async def work(tier: Tier) -> None:
        for made in mades:
            assert await tier.put(made.key, made.parts, Share(made.tenant))

    run_with_tier(options, work)


def python(script: str, *args: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A child with our import path."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", script, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("capacity_gb", [1.0, 0.02])
def test_what_was_acknowledged_before_kill_9_is_there_and_nothing_torn(
    options: dict[str, Any], pool: Pool, capacity_gb: float
) -> None:
    room = pool.room(PAGE_BYTES, MIB)
    acknowledged: list[tuple[bytes, int]] = []
    chance = random.Random(1)
    for number in range(6):
        child = python(WRITER, options["base_path"], str(capacity_gb), f"run{number:05d}")
        assert child.stdout is not None
        with child, child.stdout:
            lines = [child.stdout.readline() for _ in range(chance.randrange(1, 60))]
            os.kill(child.pid, signal.SIGKILL)
            lines += child.stdout.readlines()
        acknowledged += [
            (bytes.fromhex(key), int(size))
            for key, _, size in (line.strip().partition(" ") for line in lines if line.endswith("\n"))
        ]

        async def check(tier: Tier, acknowledged: Sequence[tuple[bytes, int]] = tuple(acknowledged)) -> int:
            files = await settled(tier, Path(options["base_path"]))
            for path in files:
                key = bytes.fromhex(path.name)
                source = random.Random(key)
                size = source.choice([8, 64, 256, 1024]) * KIB
                parts = [room[0], room[1][:size]]
                assert path.stat().st_size == PAGE_BYTES + size
                assert await tier.get(key, parts), "a file under its own name is whole"
                assert parts[1] == source.randbytes(size)
            assert os.listdir(Path(options["base_path"]) / "1" / "writing") == []
            if capacity_gb == 1.0:
                sizes = await tier.contains([key for key, _ in acknowledged])
                assert sizes == [size for _, size in acknowledged]
            return len(files)

        assert run_with_tier({**options, "capacity_gb": capacity_gb}, check) > 0
    assert len(acknowledged) > 6


def _truncate(path: Path, _: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path, _: Path) -> None:
    os.truncate(path, 0)


def _lengthen(path: Path, _: Path) -> None:
    with path.open("ab") as file:
        file.write(bytes(PAGE_BYTES))


def _flip(path: Path, _: Path) -> None:
    with path.open("r+b") as file:
        file.seek(60)
        byte = file.read(1)[0]
        file.seek(60)
        file.write(bytes([byte ^ 4]))


def _swap(path: Path, other: Path) -> None:
    path.rename(path.parent / "aside")
    other.rename(path)
    (path.parent / "aside").rename(other)


def _link(path: Path, _: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = [_truncate, _empty, _lengthen, _flip, _swap, _link]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_dropped_by_the_next_start(
    options: dict[str, Any], pool: Pool, damage: Callable[[Path, Path], None]
) -> None:
    mades = [pool.made(2, 64 * KIB) for _ in range(4)]
    fill(options, mades)
    damage(file_of(options, mades[0].key), file_of(options, mades[1].key))
    lost = 2 if damage is _swap else 1

    async def work(tier: Tier) -> None:
        await until(tier, 4 - lost)
        assert await tier.contains([made.key for made in mades]) == [0] * lost + [mades[0].num_bytes] * (4 - lost)
        assert await tier.put(mades[0].key, mades[0].parts, ANYBODY)
        assert await tier.get(mades[0].key, room)

    room = pool.room_for(mades[0])
    run_with_tier(options, work)
    assert same(room, mades[0])


@pytest.mark.parametrize("damage", [_truncate, _empty, _lengthen, lambda path, _: path.unlink(), _link])
def test_a_file_damaged_under_a_running_tier_is_absent_and_can_be_stored_again(
    options: dict[str, Any], pool: Pool, damage: Callable[[Path, Path], None]
) -> None:
    made = pool.made(2, 64 * KIB)
    room = pool.room_for(made)

    async def work(tier: Tier) -> None:
        assert await tier.put(made.key, made.parts, ANYBODY)
        damage(file_of(options, made.key), Path())
        assert await tier.get(made.key, room) is False
        assert await tier.contains([made.key]) == [0]
        assert await tier.put(made.key, made.parts, ANYBODY)
        assert await tier.get(made.key, room) is True

    run_with_tier(options, work)
    assert same(room, made)


def test_files_that_are_not_ours_are_left_alone(options: dict[str, Any], pool: Pool) -> None:
    made = pool.made()
    fill(options, [made])
    folder = file_of(options, made.key).parent
    others = [folder / "notes", folder / (made.key.hex() + ".bak"), folder.parent / "mine", folder / ("A" * 64)]
    for path in others:
        path.write_text("somebody's")

    async def work(tier: Tier) -> None:
        await until(tier, 1)
        await tier.delete([made.key])

    run_with_tier(options, work)
    assert [path.read_text() for path in others] == ["somebody's"] * len(others)


def test_order_of_use_and_tenants_are_known_after_a_restart(options: dict[str, Any], pool: Pool) -> None:
    mades = [pool.made(1, 512 * KIB, tenant=bytes([65 + index]) * 16) for index in range(5)]
    options["capacity_gb"] = capacity_for(4, mades[0])

    async def work(tier: Tier) -> None:
        for made in mades[:4]:
            assert await tier.put(made.key, made.parts, Share(made.tenant))
            await asyncio.sleep(0.02)  # file systems round times to ticks
        assert await tier.get(mades[0].key, pool.room_for(mades[0]))

    async def again(tier: Tier) -> None:
        await until(tier, 4)
        usage = await tier.usage()
        assert usage.tenant_bytes == {made.tenant: made.num_bytes for made in mades[:4]}
        assert await tier.put(mades[4].key, mades[4].parts, ANYBODY)
        assert [size > 0 for size in await tier.contains([made.key for made in mades])] == [True, False, *[True] * 3]

    run_with_tier(options, work)
    run_with_tier(options, again)


def test_a_full_tier_gives_up_the_longest_unused_and_keeps_to_its_capacity(options: dict[str, Any], pool: Pool) -> None:
    mades = [pool.made(1, size * KIB) for size in [512] * 6 + [256, 1024, 512]]
    options["capacity_gb"] = capacity_for(4, mades[0])

    async def work(tier: Tier) -> None:
        for made in mades:
            assert await tier.put(made.key, made.parts, ANYBODY)
            held = sum(path.stat().st_size for path in Path(options["base_path"]).glob("1/??/*"))
            usage = await tier.usage()
            assert held == usage.used_bytes <= usage.capacity_bytes  # type: ignore[operator]
        kept = [made for made in mades if (await tier.contains([made.key]))[0]]
        assert kept == mades[-len(kept) :]
        for made in kept:
            room = pool.room_for(made)
            assert await tier.get(made.key, room)
            assert same(room, made)
        assert (await tier.usage()).num_evicted == len(mades) - len(kept)

    run_with_tier(options, work)


def test_a_copy_made_by_linking_files_is_not_written_into(options: dict[str, Any], pool: Pool, tmp_path: Path) -> None:
    first, second = pool.made(1, 2 * MIB), pool.made(1, 2 * MIB)
    options["capacity_gb"] = capacity_for(1, first)

    async def work(tier: Tier) -> None:
        assert await tier.put(first.key, first.parts, ANYBODY)
        os.link(file_of(options, first.key), tmp_path / "copy")
        assert await tier.put(second.key, second.parts, ANYBODY)
        assert await tier.contains([first.key]) == [0]

    run_with_tier(options, work)
    assert (tmp_path / "copy").read_bytes() == b"".join(first.content)


def test_a_folder_has_one_server_and_is_free_when_that_ends(options: dict[str, Any], pool: Pool) -> None:
    made = pool.made()

    async def work(tier: Tier) -> None:
        second = make_tier(options)
        with pytest.raises(TierError, match="another server uses"):
            await second.open()
        assert await tier.put(made.key, made.parts, ANYBODY)
        await tier.close()
        await second.open()
        assert await second.contains([made.key]) == [made.num_bytes]
        await second.close()

    async def main() -> None:
        tier = make_tier(options)
        await tier.open()
        await work(tier)

    asyncio.run(asyncio.wait_for(main(), HANG_S))


def test_a_folder_that_others_may_write_is_refused(options: dict[str, Any]) -> None:
    fill(options, [])
    inner = Path(options["base_path"]) / "1"
    assert inner.stat().st_mode & 0o777 == 0o700
    inner.chmod(0o755)
    with pytest.raises(TierError, match="0700"):
        fill(options, [])


def test_objects_are_for_their_owner_only(options: dict[str, Any], pool: Pool) -> None:
    made = pool.made()
    fill(options, [made])
    path = file_of(options, made.key)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_folder_deleted_under_a_running_tier_is_made_again(options: dict[str, Any], pool: Pool, depth: int) -> None:
    mades = [pool.made() for _ in range(4)]
    room = pool.room_for(mades[0])
    path = file_of(options, mades[0].key)
    victim = [Path(options["base_path"]), path.parents[1], path.parent]

    async def work(tier: Tier) -> None:
        for made in mades[:3]:
            assert await tier.put(made.key, made.parts, ANYBODY)
        shutil.rmtree(victim[depth])
        assert await tier.get(mades[0].key, room) is False
        assert await tier.put(mades[3].key, mades[3].parts, ANYBODY)
        assert await tier.put(mades[0].key, mades[0].parts, ANYBODY)
        assert await tier.get(mades[0].key, room)
        second = make_tier(options)
        with pytest.raises(TierError, match="another server uses"):
            await second.open()
        await second.close()
        if depth < 2:
            await until(tier, 2)

    run_with_tier(options, work)
    assert same(room, mades[0])


def test_a_tier_serves_while_it_looks_through_its_folder(options: dict[str, Any], pool: Pool) -> None:
    mades = [pool.made(1, 8 * KIB) for _ in range(3000)]
    fill(options, mades)
    extra, gone, replaced = pool.made(), mades[5], pool.made(1, 64 * KIB, mades[7].key)
    room, room_of_last = pool.room_for(replaced), pool.room_for(mades[-1])

    async def work(tier: Tier) -> None:
        assert await tier.contains([made.key for made in mades]) == [made.num_bytes for made in mades]
        assert await tier.put(extra.key, extra.parts, ANYBODY)
        await tier.delete([gone.key])
        assert await tier.contains([gone.key]) == [0]
        assert await tier.put(replaced.key, replaced.parts, ANYBODY)
        assert await tier.get(mades[-1].key, room_of_last)
        await until(tier, 3000)
        usage = await tier.usage()
        assert usage.used_bytes == sum(made.num_bytes for made in [*mades, extra, replaced]) - 2 * gone.num_bytes
        assert await tier.get(replaced.key, room)

    run_with_tier(options, work)
    assert same(room, replaced)
    assert same(room_of_last, mades[-1])


def test_a_smaller_capacity_is_kept_after_a_restart(options: dict[str, Any], pool: Pool) -> None:
    mades = [pool.made(1, 64 * KIB) for _ in range(40)]
    fill(options, mades)
    options["capacity_gb"] = capacity_for(20, mades[0])
    run_with_tier(options, lambda tier: until(tier, 20))


FULL = """
import asyncio, json, os, sys
from making import Pool
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share
async def main():
    tier = make_tier({"type": "file", "base_path": sys.argv[1] + "/tier", "capacity_gb": 1})
    await tier.open()
    pool = Pool(64 << 20)
    mades = [pool.made(1, 1 << 20) for _ in range(20)]
    stored = [await tier.put(made.key, made.parts, Share(bytes(16))) for made in mades]
    told = (await tier.usage()).problem
    there = await tier.contains([made.key for made in mades])
    await tier.delete([made.key for made in mades])
    with open(sys.argv[1] + "/filler", "wb", buffering=0) as filler:
        try:
            while filler.write(bytes(4096)):
                pass
        except OSError:
            pass
    refused = [await tier.put(made.key, made.parts, Share(bytes(16))) for made in mades[:3]]
    told_again = (await tier.usage()).problem
    os.unlink(sys.argv[1] + "/filler")
    tries = 0
    while not await tier.put(mades[0].key, mades[0].parts, Share(bytes(16))):
        tries += 1
        await asyncio.sleep(0.05)
    room = pool.room_for(mades[0])
    whole = await tier.get(mades[0].key, room) and b"".join(room) == b"".join(mades[0].content)
    await tier.close()
    print(json.dumps([stored, there, told, refused, told_again, tries, whole]))
asyncio.run(asyncio.wait_for(main(), 100))
"""


def mounted(kind: str, tmp_path: Path, script: str) -> Any:
    """What a child printed that has a file system of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    shell = f'mount -t {kind} none "$1" && shift && exec "$@"'
    child = python(script, str(folder), before=["unshare", "-rm", "sh", "-c", shell, "sh", str(folder)])
    output, _ = child.communicate(timeout=HANG_S)
    assert child.returncode == 0
    return json.loads(output)


def test_a_full_file_system_costs_the_oldest_objects_or_new_ones_and_never_more(tmp_path: Path) -> None:
    stored, there, told, refused, told_again, tries, whole = mounted("tmpfs -o size=8m", tmp_path, FULL)
    assert stored[:6] == [True] * 6
    assert stored[-1] is True
    assert 4 <= sum(size > 0 for size in there) <= 7
    assert there[-1] > 0
    assert "full" in told
    assert refused == [False] * 3
    assert "full" in told_again
    assert tries > 0
    assert whole is True


PAGE_CACHE = """
import asyncio, json, sys
from making import Pool, same
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share
async def main():
    tier = make_tier({"type": "file", "base_path": sys.argv[1] + "/tier", "capacity_gb": 1})
    await tier.open()
    pool = Pool(4 << 20)
    made = pool.made(2, 1 << 18)
    room = pool.room_for(made)
    stored = await tier.put(made.key, made.parts, Share(bytes(16)))
    found = await tier.get(made.key, room)
    print(json.dumps([stored, found, same(room, made), (await tier.usage()).problem]))
    await tier.close()
asyncio.run(asyncio.wait_for(main(), 100))
"""


def test_a_file_system_without_direct_writes_is_used_through_the_page_cache(tmp_path: Path) -> None:
    stored, found, is_same, problem = mounted("ramfs", tmp_path, PAGE_CACHE)
    assert (stored, found, is_same) == (True, True, True)
    assert "O_DIRECT" in problem


def test_a_file_system_that_refuses_is_told_in_one_sentence(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def main() -> None:
        tier = make_tier({**options, "base_path": str(tmp_path / "file" / "below")})
        with pytest.raises(TierError, match="Not a directory"):
            await tier.open()
        with pytest.raises(TierError, match="Not a directory"):
            await tier.open()
        await tier.close()

    asyncio.run(asyncio.wait_for(main(), HANG_S))


def test_a_key_that_was_just_pushed_out_can_come_back_at_once(options: dict[str, Any], pool: Pool) -> None:
    mades = [pool.made(1, 512 * KIB) for _ in range(12)]
    options["capacity_gb"] = capacity_for(4, mades[0])
    room = {made.key: pool.room_for(made) for made in mades}

    async def work(tier: Tier) -> None:
        chance = random.Random(3)
        busy: set[bytes] = set()

        async def churn() -> None:
            for _ in range(150):
                made = chance.choice([made for made in mades if made.key not in busy])
                busy.add(made.key)
                if chance.random() < 0.5:
                    assert isinstance(await tier.put(made.key, made.parts, ANYBODY), bool)
                elif await tier.get(made.key, room[made.key]):
                    assert same(room[made.key], made)
                busy.discard(made.key)

        await asyncio.gather(*(churn() for _ in range(3)))
        usage = await tier.usage()
        files = list(Path(options["base_path"]).glob("1/??/*"))
        assert len(files) == usage.num_objects
        assert sum(path.stat().st_size for path in files) == usage.used_bytes

    run_with_tier(options, work)
