"""The file tier: order, capacity, owners, and what it leaves alone."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import HANG_S, run_with_tier
from file_running import capacity_for, file_of, fill, until
from making import KIB, MIB, Pool, same

from lmcache.errors import TierError
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share, Tier

ANYBODY = Share(bytes(16))


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    """A tier with room for everything that these tests store."""
    return {"type": "file", "base_path": str(tmp_path / "tier"), "capacity_gb": 1}


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
