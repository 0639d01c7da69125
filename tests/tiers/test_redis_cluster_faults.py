"""What happens to the redis tier when a cluster changes, or part of it dies or hangs."""

from __future__ import annotations

from pathlib import Path

import pytest
from redis_running import CONTINUE, STOP, RedisServer, missing, name_of, options, redis_cluster, redis_server
from remote_objects import NOBODY, blank, holds, made, opened, run, size, when_up

from lmcache.errors import TierError
from lmcache.tiers import redis_cluster as slots

pytest.importorskip("redis")
pytestmark = pytest.mark.skipif(missing("redis-server") is not None, reason="redis-server is not installed")


def test_a_cluster_node_that_dies_costs_its_own_keys_only(tmp_path: Path) -> None:
    async def body(servers: list[RedisServer]) -> None:
        kept = [made(index) for index in range(30)]
        async with opened(options(servers[0], cluster=True, timeout_s=2)) as tier:
            for one in kept:
                assert await tier.put(*one, NOBODY)
            servers[2].kill()
            lost = {one[0] for one in kept if slots.slot(name_of(one[0]).encode()) >= 2 * slots.SLOTS // 3}
            assert 0 < len(lost) < len(kept)
            for one in kept:
                if one[0] in lost:
                    with pytest.raises(TierError):
                        await tier.get(one[0], blank(one[1]))
                else:
                    assert await holds(tier, *one)
            servers[2].start()
            for one in kept:
                await when_up(tier.put, *one, NOBODY)
                assert await holds(tier, *one)

    with redis_cluster(tmp_path) as servers:
        run(body(servers))


def test_a_cluster_node_that_hangs_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async def body(servers: list[RedisServer]) -> None:
        kept = [made(index) for index in range(30)]
        hanging = {one[0] for one in kept if slots.slot(name_of(one[0]).encode()) < slots.SLOTS // 3}
        async with opened(options(servers[0], cluster=True, timeout_s=1)) as tier:
            for one in kept:
                assert await tier.put(*one, NOBODY)
            servers[0].signal(STOP)  # the seed, and the first that is asked for the slots
            with pytest.raises(TierError):
                await tier.contains([one[0] for one in kept])
            for one in kept:
                if one[0] not in hanging:
                    assert await holds(tier, *one)
                    assert await tier.contains([one[0]]) == [size(one[1])]
            with pytest.raises(TierError):
                await tier.get(min(hanging), blank(kept[0][1]))
            servers[0].signal(CONTINUE)
            for one in kept:
                await when_up(tier.put, *one, NOBODY)

    with redis_cluster(tmp_path) as servers:
        run(body(servers))


def test_a_slot_that_moves_is_followed(tmp_path: Path) -> None:
    async def body(servers: list[RedisServer]) -> None:
        # a key of the first server
        moving = next(one for one in map(made, range(100)) if slots.slot(name_of(one[0]).encode()) < slots.SLOTS // 3)
        slot = str(slots.slot(name_of(moving[0]).encode()))
        source, target = servers[0], servers[1]
        ids = [server.say("CLUSTER", "MYID").split(b"\r\n")[1].decode() for server in (source, target)]
        async with opened(options(source, cluster=True)) as tier:
            assert await tier.put(*moving, NOBODY)
            target.say("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
            source.say("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
            assert await holds(tier, *moving)
            source.say("MIGRATE", "127.0.0.1", str(target.port), name_of(moving[0]), "0", "5000")
            # the source points to the target, for this once
            assert await holds(tier, *moving)
            assert await tier.contains([moving[0]]) == [size(moving[1])]
            assert await tier.put(*moving, NOBODY)
            for server in servers:
                server.say("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
            # and now for good
            assert await tier.contains([moving[0]]) == [size(moving[1])]
            assert await holds(tier, *moving)
            await tier.delete([moving[0]])
            assert await tier.contains([moving[0]]) == [0]

    with redis_cluster(tmp_path) as servers:
        run(body(servers))


def test_a_cluster_must_be_named_one(tmp_path: Path) -> None:
    async def body(servers: list[RedisServer]) -> None:
        with pytest.raises(TierError, match="'cluster' to true"):
            async with opened(options(servers[0])):
                pass

    with redis_cluster(tmp_path) as servers:
        run(body(servers))


def test_a_lone_server_is_no_cluster(tmp_path: Path) -> None:
    async def body(server: RedisServer) -> None:
        with pytest.raises(TierError, match="cluster support disabled"):
            async with opened(options(server, cluster=True)):
                pass

    with redis_server(tmp_path) as server:
        run(body(server))
