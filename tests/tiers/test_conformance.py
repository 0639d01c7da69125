"""What every tier owes, on its real store. ``docs/tiers.md`` tells an adapter's author how to join."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
from typing import Any

import pytest
from conftest import HANG_S, Options, Use
from making import KIB, MIB, Pool, same

from lmcache.errors import ConfigError
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share, Tier, Usage
from lmcache.tiers.objects import PAGE_BYTES
from lmcache.tiers.options import SECRETS

STEADY = 8  # equal answers in a row
ANYBODY = Share(bytes(16))
SHAPES = [(1, 64 * KIB), (1, 8 * MIB - PAGE_BYTES), (2, MIB), (3, 100_001), (8, 256 * KIB)]

CONSTRUCT = """
import json, sys
from lmcache.tiers import make_tier
options = json.load(sys.stdin)
doings, before = [], set(sys.modules)
watched = ("socket.connect", "socket.bind", "os.mkdir", "subprocess.Popen", "_thread.start_new_thread")
def watch(event, args):
    is_writing = event == "open" and isinstance(args[2], int) and args[2] & 3
    if is_writing or event in watched:
        doings.append(f"{event} {args}")
sys.addaudithook(watch)
tier = make_tier(options)
print(json.dumps([doings, sorted({name.partition(".")[0] for name in set(sys.modules) - before})]))
"""


async def steady_usage(tier: Tier) -> Usage:
    """What a tier holds, once it has come to know that after ``open``."""
    last, equal = await tier.usage(), 0
    while equal < STEADY:
        await asyncio.sleep(0.05)
        now = await tier.usage()
        last, equal = now, equal + 1 if now == last else 0
    return last


def test_constructing_a_tier_does_nothing_but_read_its_options(store: Options) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CONSTRUCT],
        input=json.dumps(store),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stderr
    doings, imported = json.loads(done.stdout)
    assert doings == []
    assert not {"redis", "obstore", "mooncake", "nixl", "nixl_cu12", "nixl_cu13"} & set(imported)


def test_an_option_that_nobody_knows_is_refused(store: Options) -> None:
    with pytest.raises(ConfigError, match="'no_such_option'"):
        make_tier({**store, "no_such_option": 1})


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_among_the_options_is_refused_and_not_repeated(store: Options, name: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_tier({**store, name: "hunter2"})
    assert "hunter2" not in str(raised.value)
    assert name in str(raised.value)


def test_a_tier_says_what_it_is(store: Options) -> None:
    tier = make_tier(store)
    assert tier.kind.endswith("L2Adapter")
    assert tier.backend
    assert tier.place is None or isinstance(tier.place, str)
    assert isinstance(tier.survives, bool)
    assert 1 <= tier.concurrency <= 256
    asyncio.run(asyncio.wait_for(tier.close(), HANG_S))


def test_what_was_never_put_is_absent(store: Options, pool: Pool, use: Use[Any]) -> None:
    keys = [secrets.token_bytes(32) for _ in range(1000)]

    async def work(tier: Tier) -> None:
        assert await tier.contains(keys) == [0] * len(keys)
        assert await tier.contains([]) == []
        assert await tier.get(keys[0], pool.room(PAGE_BYTES, 64 * KIB)) is False
        await tier.delete(keys[:2])
        await tier.delete([])

    use(store, work)


def test_a_put_is_answered_and_leaves_its_parts_alone(store: Options, pool: Pool, use: Use[Any]) -> None:
    made = pool.made(2, 256 * KIB)

    async def work(tier: Tier) -> None:
        stored = await tier.put(made.key, made.parts, ANYBODY)
        assert isinstance(stored, bool)
        assert await tier.contains([made.key]) == [made.num_bytes if stored else 0]

    use(store, work)
    assert same(made.parts, made)


@pytest.mark.parametrize(("ranks", "extent_bytes"), SHAPES)
def test_an_object_comes_back_byte_for_byte(
    keeper: Options, pool: Pool, use: Use[Any], ranks: int, extent_bytes: int
) -> None:
    made = pool.made(ranks, extent_bytes)
    room = pool.room_for(made)

    async def work(tier: Tier) -> None:
        assert await tier.put(made.key, made.parts, ANYBODY) is True
        assert await tier.contains([made.key]) == [made.num_bytes]
        assert await tier.get(made.key, room) is True

    use(keeper, work)
    assert same(room, made)


def test_an_object_of_more_ranks_than_one_system_call_takes_comes_back(
    keeper: Options, pool: Pool, use: Use[Any]
) -> None:
    made = pool.made(1100, PAGE_BYTES)
    room = pool.room_for(made)

    async def work(tier: Tier) -> None:
        assert await tier.put(made.key, made.parts, ANYBODY) is True
        assert await tier.get(made.key, room) is True

    use(keeper, work)
    assert same(room, made)


def test_parts_of_another_length_get_nothing_and_cost_nothing(keeper: Options, pool: Pool, use: Use[Any]) -> None:
    made = pool.made(2, 64 * KIB)
    short, long = pool.room(PAGE_BYTES, 64 * KIB), pool.room(PAGE_BYTES, 64 * KIB, 64 * KIB, PAGE_BYTES)
    split = pool.room(PAGE_BYTES, 128 * KIB)

    async def work(tier: Tier) -> None:
        assert await tier.put(made.key, made.parts, ANYBODY)
        assert await tier.get(made.key, short) is False
        assert await tier.get(made.key, long) is False
        assert await tier.get(made.key, split) is True

    use(keeper, work)
    assert b"".join(split) == b"".join(made.content)


@pytest.mark.parametrize("second_bytes", [64 * KIB, 8 * KIB, MIB])
def test_a_second_put_takes_the_place_of_the_first(
    keeper: Options, pool: Pool, use: Use[Any], second_bytes: int
) -> None:
    first = pool.made(1, 64 * KIB)
    second = pool.made(1, second_bytes, first.key)
    room = pool.room_for(second)

    async def work(tier: Tier) -> None:
        assert await tier.put(first.key, first.parts, ANYBODY)
        assert await tier.put(second.key, second.parts, ANYBODY)
        assert await tier.contains([first.key]) == [second.num_bytes]
        assert await tier.get(first.key, room) is True

    use(keeper, work)
    assert same(room, second)


def test_what_was_deleted_is_gone_and_can_come_back(keeper: Options, pool: Pool, use: Use[Any]) -> None:
    mades = [pool.made() for _ in range(3)]
    room = pool.room_for(mades[0])

    async def work(tier: Tier) -> None:
        for made in mades:
            assert await tier.put(made.key, made.parts, ANYBODY)
        await tier.delete([mades[0].key, secrets.token_bytes(32), mades[2].key])
        assert await tier.contains([made.key for made in mades]) == [0, mades[1].num_bytes, 0]
        assert await tier.get(mades[0].key, room) is False
        assert await tier.put(mades[0].key, mades[0].parts, ANYBODY)
        assert await tier.get(mades[0].key, room) is True

    use(keeper, work)
    assert same(room, mades[0])


def test_contains_answers_in_the_order_of_the_keys(keeper: Options, pool: Pool, use: Use[Any]) -> None:
    mades = [pool.made(1, (index + 1) * 8 * KIB) for index in range(6)]
    absent = [secrets.token_bytes(32) for _ in mades]

    async def work(tier: Tier) -> None:
        for made in mades:
            assert await tier.put(made.key, made.parts, ANYBODY)
        keys = [key for made, other in zip(mades, absent, strict=True) for key in (other, made.key)]
        sizes = [size for made in mades for size in (0, made.num_bytes)]
        assert await tier.contains(keys) == sizes
        assert await tier.contains(keys[::-1]) == sizes[::-1]

    use(keeper, work)


def test_calls_on_different_keys_do_not_mix_their_bytes(keeper: Options, pool: Pool, use: Use[Any]) -> None:
    mades = [pool.made(1 + index % 3, (1 + index % 4) * 64 * KIB) for index in range(24)]
    rooms = [pool.room_for(made) for made in mades]

    async def work(tier: Tier) -> None:
        places = asyncio.Semaphore(tier.concurrency)

        async def there_and_back(index: int) -> None:
            made = mades[index]
            async with places:
                assert await tier.put(made.key, made.parts, ANYBODY)
            async with places:
                assert await tier.get(made.key, rooms[index])

        await asyncio.gather(*(there_and_back(index) for index in range(len(mades))))

    use(keeper, work)
    for room, made in zip(rooms, mades, strict=True):
        assert same(room, made)


def test_an_object_is_read_whole_while_others_are_written_and_removed(
    keeper: Options, pool: Pool, use: Use[Any]
) -> None:
    kept, coming = pool.made(2, MIB), [pool.made(2, MIB) for _ in range(8)]
    rooms = [pool.room_for(kept) for _ in range(8)]

    async def work(tier: Tier) -> None:
        assert await tier.put(kept.key, kept.parts, ANYBODY)

        async def read() -> None:
            for room in rooms:
                assert await tier.get(kept.key, room)

        async def write() -> None:
            for made in coming:
                assert await tier.put(made.key, made.parts, ANYBODY)
                await tier.delete([made.key])

        if tier.concurrency > 1:  # else the framework would not do this to it
            await asyncio.gather(read(), write())
        else:
            await write()
            await read()

    use(keeper, work)
    assert all(same(room, kept) for room in rooms)


def test_objects_outlive_the_tier_where_it_says_so(keeper: Options, pool: Pool, use: Use[Any]) -> None:
    mades = [pool.made(2, 64 * KIB) for _ in range(5)]
    rooms = [pool.room_for(made) for made in mades]

    async def fill(tier: Tier) -> bool:
        for made in mades:
            assert await tier.put(made.key, made.parts, ANYBODY)
        return tier.survives

    async def look(tier: Tier) -> None:
        sizes = await tier.contains([made.key for made in mades])
        assert sizes == [made.num_bytes if survives else 0 for made in mades]
        for made, room in zip(mades, rooms, strict=True):
            assert await tier.get(made.key, room) is survives
            assert not survives or same(room, made)

    survives = use(keeper, fill)
    use(keeper, look)


def test_usage_counts_what_is_there_or_says_that_it_cannot_tell(store: Options, pool: Pool, use: Use[Any]) -> None:
    mades = [pool.made(1, 128 * KIB, tenant=b"T" * 16) for _ in range(3)]

    async def work(tier: Tier) -> None:
        before = await steady_usage(tier)
        stored = [await tier.put(made.key, made.parts, Share(made.tenant)) for made in mades]
        after = await tier.usage()
        num_bytes = sum(made.num_bytes for made, kept in zip(mades, stored, strict=True) if kept)
        if after.num_objects is not None and before.num_objects is not None:
            assert after.num_objects == before.num_objects + sum(stored)
        if after.used_bytes is not None and before.used_bytes is not None:
            assert after.used_bytes >= before.used_bytes + num_bytes
        if after.used_bytes is not None and after.capacity_bytes:
            assert after.used_bytes <= after.capacity_bytes
        if after.tenant_bytes is not None:
            # a tier may count only those that have a limit
            assert after.tenant_bytes.get(b"T" * 16, num_bytes) == num_bytes
        assert after.num_evicted >= before.num_evicted >= 0
        await tier.delete([made.key for made in mades])

    use(store, work)


def test_a_limited_tenant_never_has_more_than_its_share(keeper: Options, pool: Pool, use: Use[Any]) -> None:
    tenant = secrets.token_bytes(16)
    mades = [pool.made(1, 64 * KIB, tenant=tenant) for _ in range(6)]
    other = pool.made(1, 64 * KIB, tenant=secrets.token_bytes(16))
    limit = mades[0].num_bytes * 2

    async def work(tier: Tier) -> None:
        assert await tier.put(other.key, other.parts, Share(other.tenant))
        for made in mades:
            stored = await tier.put(made.key, made.parts, Share(tenant, limit))
            sizes = await tier.contains([made.key for made in mades])
            assert sum(sizes) <= limit
            assert sizes[mades.index(made)] == (made.num_bytes if stored else 0)
        assert await tier.put(mades[0].key, mades[0].parts, Share(tenant, mades[0].num_bytes - 1)) is False
        assert await tier.contains([other.key]) == [other.num_bytes]

    use(keeper, work)


def test_a_tier_that_was_never_opened_can_be_closed(store: Options) -> None:
    asyncio.run(asyncio.wait_for(make_tier(store).close(), HANG_S))
