"""The file tier when disks, people and other processes misbehave."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_S, run_with_tier
from file_running import file_of, fill, mounted, python, settled, until
from making import KIB, MIB, Pool, same

from lmcache.errors import TierError
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share, Tier
from lmcache.tiers.objects import PAGE_BYTES

ANYBODY = Share(bytes(16))

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
            await asyncio.sleep(0)  # a refusal is answered at once
            if await tier.put(key, parts, Share(bytes(16))):
                print(key.hex(), sum(map(len, parts)), flush=True)
    await asyncio.gather(*map(work, rooms))
asyncio.run(main())
"""


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A tier with room for everything that these tests store."""
    return {"type": "file", "base_path": str(tmp_path / "tier"), "capacity_gb": 1}


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


def _unlink(path: Path, _: Path) -> None:
    path.unlink()


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


@pytest.mark.parametrize("damage", [_truncate, _empty, _lengthen, _unlink, _link])
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
