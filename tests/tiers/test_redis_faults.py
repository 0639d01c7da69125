"""What happens to the redis tier when its store dies, stops, fills up, or lies."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nonsense_server import SAID
from redis_running import (
    CONTINUE,
    STOP,
    WAIT_S,
    RedisServer,
    certificates,
    missing,
    name_of,
    options,
    redis_server,
    tls_options,
)
from remote_objects import HANG_S, NOBODY, blank, holds, made, opened, run, size

from lmcache.errors import ConfigError, TierError
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share

pytest.importorskip("redis")
pytestmark = pytest.mark.skipif(missing("redis-server") is not None, reason="redis-server is not installed")

TENANT, OTHER = b"t" * 16, b"o" * 16


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with redis_server(tmp_path / "redis") as running:
        yield running


def test_a_killed_server_is_an_error_and_its_successor_is_used_at_once(server: RedisServer) -> None:
    async def body() -> None:
        key, parts = made("one")
        async with opened(options(server)) as tier:
            assert await tier.put(key, parts, NOBODY)
            server.kill()
            for _ in range(2):
                with pytest.raises(TierError, match=f"127.0.0.1:{server.port}"):
                    await tier.get(key, blank(parts))
            server.start()
            assert await tier.contains([key]) == [0]
            assert await tier.put(key, parts, NOBODY)
            assert await holds(tier, key, parts)

    run(body())


def test_connections_that_died_unseen_cost_no_call(server: RedisServer) -> None:
    async def body() -> None:
        key, parts = made("one")
        async with opened(options(server)) as tier:
            assert await tier.put(key, parts, NOBODY)
            server.kill()
            server.start()
            assert await tier.put(key, parts, NOBODY)
            server.say("CLIENT", "KILL", "TYPE", "normal")
            assert await holds(tier, key, parts)

    run(body())


def test_a_stopped_server_is_an_error_in_time_and_works_again_when_it_goes_on(server: RedisServer) -> None:
    async def body() -> None:
        key, parts = made("one", extent_bytes=8 << 20)
        async with opened(options(server, timeout_s=0.5)) as tier:
            assert await tier.put(key, parts, NOBODY)
            assert (await tier.usage()).num_objects == 1
            server.signal(STOP)
            calls = (
                tier.get(key, blank(parts)),
                tier.put(key, parts, NOBODY),
                tier.contains([key]),
                tier.delete([key]),
            )
            for call in calls:
                with pytest.raises(TierError, match="did not answer in time"):
                    await call
            assert (await tier.usage()).num_objects == 1  # what was known
            server.signal(CONTINUE)
            assert await tier.put(key, parts, NOBODY)
            assert await holds(tier, key, parts)

    run(body())


def test_close_ends_calls_that_wait(server: RedisServer) -> None:
    async def body() -> None:
        key, parts = made("one")
        tier = make_tier(options(server, timeout_s=10 * HANG_S))
        await tier.open()
        server.signal(STOP)
        waiting = asyncio.create_task(tier.get(key, parts))
        await asyncio.sleep(0.2)
        await tier.close()
        with pytest.raises(TierError):
            await waiting

    run(body())


def test_a_full_server_takes_no_more_and_says_why_until_it_has_room_again(server: RedisServer) -> None:
    async def body() -> None:
        old, new, counted = made("old"), made("new"), made("counted", tenant=TENANT)
        async with opened(options(server)) as tier:
            assert await tier.put(*old, NOBODY)
            assert await tier.put(*counted, Share(TENANT, 1 << 30))
            server.say("CONFIG", "SET", "maxmemory", "1")
            assert not await tier.put(*new, NOBODY)
            assert not await tier.put(*new, Share(TENANT, 1 << 30))
            assert not await tier.put(*counted, Share(TENANT, 1 << 30))  # the older one is still there, and counts
            usage = await tier.usage()
            assert usage.capacity_bytes == 1
            assert usage.problem is not None
            assert "full" in usage.problem
            assert usage.tenant_bytes == {TENANT: size(counted[1])}
            assert await holds(tier, *old)
            assert not await holds(tier, *new)
            server.say("CONFIG", "SET", "maxmemory", "0")
            assert await tier.put(*new, NOBODY)
            assert (await tier.usage()).problem is None

    run(body())


def test_a_server_that_evicts_by_itself_takes_everything_and_what_it_evicted_is_absent(server: RedisServer) -> None:
    async def body() -> None:
        server.say("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        server.say("CONFIG", "SET", "maxmemory", str(8 << 20))
        kept = [made(index, 512 << 10) for index in range(24)]
        async with opened(options(server)) as tier:
            for one in kept:
                assert await tier.put(*one, NOBODY)
            sizes = await tier.contains([key for key, _ in kept])
            there = [await holds(tier, *one) for one in kept]
            assert there == [found > 0 for found in sizes]
            assert 0 < sum(there) < len(kept)
            assert (await tier.usage()).num_evicted >= len(kept) - sum(there)

    run(body())


@pytest.mark.parametrize("length", [0, 1, 4096, 128 << 10, (8 << 20) + 4096])
def test_a_value_of_another_length_is_no_object(server: RedisServer, length: int) -> None:
    async def body() -> None:
        changed, sound = made("changed"), made("sound")
        async with opened(options(server)) as tier:
            assert await tier.put(*changed, NOBODY)
            assert await tier.put(*sound, NOBODY)
            server.say("SET", name_of(changed[0]), b"x" * length)
            assert not await tier.get(changed[0], blank(changed[1]))
            assert await holds(tier, *sound)
            assert await tier.put(*changed, NOBODY)
            assert await holds(tier, *changed)

    run(body())


def test_a_value_of_another_type_is_no_object_and_is_replaced(server: RedisServer) -> None:
    async def body() -> None:
        key, parts = made("one")
        server.say("RPUSH", name_of(key), "x")
        async with opened(options(server)) as tier:
            assert await tier.contains([key]) == [0]
            assert not await tier.get(key, blank(parts))
            assert await tier.put(key, parts, NOBODY)
            assert await holds(tier, key, parts)

    run(body())


def test_an_object_longer_than_a_value_may_be_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    async def body(server: RedisServer) -> None:
        long, short = made("long", 1 << 20), made("short")
        async with opened(options(server)) as tier:
            assert not await tier.put(*long, NOBODY)
            assert "longer" in str((await tier.usage()).problem)
            assert await tier.put(*short, NOBODY)
            assert await holds(tier, *short)

    with redis_server(tmp_path, "--proto-max-bulk-len", "1mb") as server:
        run(body(server))


def test_a_wrong_password_is_named_and_not_shown(tmp_path: Path) -> None:
    secret = tmp_path / "secret"

    async def body(server: RedisServer) -> None:
        with pytest.raises(TierError, match=r"password_env or password_file"):
            async with opened(options(server)):
                pass
        secret.write_text("guessed\n")
        tier = make_tier(options(server, password_file=str(secret), username="kv"))
        with pytest.raises(TierError, match=r"refused the user 'kv' with this password") as refused:
            await tier.open()
        assert "guessed" not in str(refused.value) + repr(refused.value) + str(tier.place)
        await tier.close()
        secret.write_text("right\n")
        async with opened(options(server, password_file=str(secret))) as tier:
            assert await tier.put(*made("one"), NOBODY)

    with redis_server(tmp_path / "redis", "--requirepass", "right") as server:
        run(body(server))


def test_a_user_who_may_do_little_can_still_keep_objects(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    verbs = ("+get", "+set", "+strlen", "+unlink", "+getrange", "+exists")
    server.say("ACL", "SETUSER", "kv", "on", ">word", "~lmcache:*", *verbs)
    monkeypatch.setenv("KV_WORD", "word")

    async def body() -> None:
        one = made("one")
        async with opened(options(server, username="kv", password_env="KV_WORD")) as tier:
            assert await tier.put(*one, NOBODY)
            assert await holds(tier, *one)
            await tier.delete([one[0]])
            assert await tier.contains([one[0]]) == [0]
            assert (await tier.usage()).num_objects is None

    run(body())


def test_tls_is_refused_to_a_stranger_on_either_side(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "other").mkdir()
    own, other = certificates(tmp_path / "own"), certificates(tmp_path / "other")

    async def body(server: RedisServer) -> None:
        files = {"cert": own["cert"], "key": own["key"]}
        for wrong in ({"cacert": other["ca"], **files}, {"cacert": own["ca"]}):
            with pytest.raises(TierError):
                async with opened(options(server, tls=True, **wrong)):
                    pass
        with pytest.raises(TierError):
            async with opened(options(server, timeout_s=1)):  # no TLS at all
                pass

    with redis_server(tmp_path / "redis", *tls_options(own)) as server:
        run(body(server))


@contextlib.contextmanager
def nonsense(what: str, value_bytes: int) -> Iterator[int]:
    """The port of a server that says ``what`` when asked for a value."""
    command = [sys.executable, str(Path(__file__).with_name("nonsense_server.py")), what, str(value_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()
            process.wait(WAIT_S)


@pytest.mark.parametrize("what", SAID)
def test_nonsense_is_never_an_object(what: str) -> None:
    async def body(port: int) -> None:
        async with opened({"type": "redis", "port": port, "timeout_s": 1}) as tier:
            for _ in range(2):
                got: bool | None = None
                with contextlib.suppress(TierError):
                    got = await tier.get(key, blank(parts))
                assert got in (None, False)
            with pytest.raises(TierError):
                await tier.put(key, parts, NOBODY)

    key, parts = made("one")
    with nonsense(what, size(parts)) as port:
        run(body(port))


def test_a_server_that_is_no_redis_is_not_opened(tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(tmp_path), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline().partition(" port ")[2].split()[0])

            async def body() -> None:
                with pytest.raises(TierError, match=f"127.0.0.1:{port}"):
                    async with opened({"type": "redis", "port": port, "timeout_s": 1}):
                        pass

            run(body())
        finally:
            process.kill()


def test_two_servers_keep_one_tenants_limit_together_and_its_oldest_go_first(server: RedisServer) -> None:
    async def body() -> None:
        mine = [made(("mine", index), tenant=TENANT) for index in range(20)]
        others = made("other", tenant=OTHER)
        limit_bytes = 5 * size(mine[0][1])
        async with opened(options(server)) as one, opened(options(server)) as two:
            assert await one.put(*others, Share(OTHER, limit_bytes))
            for index, each in enumerate(mine):
                assert await (one, two)[index % 2].put(*each, Share(TENANT, limit_bytes))
            keys = [key for key, _ in mine]
            assert [found > 0 for found in await two.contains(keys)] == [False] * 15 + [True] * 5
            assert await holds(one, *others)
            assert (await two.usage()).tenant_bytes == {TENANT: limit_bytes}
            assert not await one.put(*mine[0], Share(TENANT, size(mine[0][1]) - 1))
            # what was deleted counts no more, whoever deletes it
            await one.delete(keys[17:18])
            assert await two.put(*mine[0], Share(TENANT, limit_bytes))
            assert [found > 0 for found in await one.contains([keys[0], *keys[15:]])] == [
                True,
                True,
                True,
                False,
                True,
                True,
            ]
            # what is put again is the youngest, and counts once
            assert await two.put(*mine[15], Share(TENANT, limit_bytes))
            assert await two.put(*mine[1], Share(TENANT, limit_bytes))
            assert [found > 0 for found in await one.contains(keys[15:17])] == [True, False]

    run(body())


def test_tenants_that_put_at_once_stay_within_their_limit(server: RedisServer) -> None:
    async def body() -> None:
        mine = [made(("mine", index), tenant=TENANT) for index in range(40)]
        share = Share(TENANT, 7 * size(mine[0][1]))
        async with opened(options(server)) as one, opened(options(server)) as two:
            for start in range(0, len(mine), 8):
                puts = [(one, two)[index % 2].put(*mine[index], share) for index in range(start, start + 8)]
                await asyncio.gather(*puts)
            found = await one.contains([key for key, _ in mine])
            assert 0 < sum(found) <= 7 * size(mine[0][1])

    run(body())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"password": "x"}, "process list"),
        ({"host": "a:b"}, "'host'"),
        ({"host": ""}, "'host'"),
        ({"host": "a:70000"}, "'host'"),
        ({"prefix": "a{b}"}, "'prefix'"),
        ({"cluster": True, "db": 1}, "neither"),
        ({"cacert": "/ca.pem"}, "'tls'"),
        ({"timeout_s": 0}, "'timeout_s'"),
        ({"hots": "a"}, "unknown option 'hots'"),
    ],
)
def test_a_wrong_option_is_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_tier({"type": "redis", **values})


@pytest.mark.parametrize(
    ("values", "place"),
    [
        ({}, "127.0.0.1:6379"),
        ({"host": "cache.example", "port": 7000, "db": 2}, "cache.example:7000/2"),
        ({"host": "a:7001,b:7002", "cluster": True}, "a:7001"),
        ({"host": "[2001:db8::1]:7000"}, "[2001:db8::1]:7000"),
        ({"host": "2001:db8::1"}, "[2001:db8::1]:6379"),
        ({"path": "/run/redis.sock"}, "/run/redis.sock"),
    ],
)
def test_its_place_is_its_address(values: dict[str, Any], place: str) -> None:
    assert make_tier({"type": "redis", **values}).place == place
