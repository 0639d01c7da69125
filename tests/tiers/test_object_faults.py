"""What happens to the object tier when its store dies, stops, fills up, lies, or knows neither us nor the bucket."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nonsense_http_server import SAID
from object_running import BUCKET, WAIT_S, S3Server, options, s3_server
from remote_objects import NOBODY, blank, holds, made, opened, run, size

from lmcache.errors import ConfigError, TierError
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share

pytest.importorskip("obstore")
pytest.importorskip("moto")

TENANT, OTHER = b"t" * 16, b"o" * 16


@pytest.fixture
def server(tmp_path: Path) -> Iterator[S3Server]:
    with s3_server(tmp_path / "s3") as running:
        yield running


def path_of(key: bytes) -> str:
    return f"/{BUCKET}/some/prefix/1/{key.hex()[:2]}/{key.hex()}"


def test_a_killed_server_is_an_error_and_its_successor_is_used(server: S3Server, tmp_path: Path) -> None:
    async def body() -> None:
        key, parts = made("one")
        async with opened(options(server, tmp_path, timeout_s=4)) as tier:
            assert await tier.put(key, parts, NOBODY)
            server.kill()
            calls = (
                tier.get(key, blank(parts)),
                tier.put(key, parts, NOBODY),
                tier.contains([key]),
                tier.delete([key]),
            )
            for call in calls:
                with pytest.raises(TierError, match="cannot be reached, or did not answer in time"):
                    await call
            await asyncio.to_thread(server.start)
            assert await tier.contains([key]) == [0]
            assert await tier.put(key, parts, NOBODY)
            assert await holds(tier, key, parts)

    run(body())


def test_a_stopped_server_is_an_error_in_time_and_works_again_when_it_goes_on(server: S3Server, tmp_path: Path) -> None:
    async def body() -> None:
        key, parts = made("one", extent_bytes=4 << 20)
        async with opened(options(server, tmp_path, timeout_s=2)) as tier:
            assert await tier.put(key, parts, NOBODY)
            server.signal(signal.SIGSTOP)
            many = [key, *(made(index)[0] for index in range(200))]
            calls = (tier.get(key, blank(parts)), tier.put(key, parts, NOBODY), tier.contains(many), tier.delete([key]))
            for call in calls:
                with pytest.raises(TierError, match="did not answer in time"):
                    await call
            server.signal(signal.SIGCONT)
            assert await tier.put(key, parts, NOBODY)
            assert await holds(tier, key, parts)

    run(body())


def test_a_store_that_is_not_there_can_be_opened_later(tmp_path: Path) -> None:
    async def body() -> None:
        with s3_server(tmp_path / "s3") as server:
            server.kill()
            tier = make_tier(options(server, tmp_path, timeout_s=1))
            for _ in range(2):
                with pytest.raises(TierError):
                    await tier.open()
            await asyncio.to_thread(server.start)
            await tier.open()
            assert await tier.put(*made("one"), NOBODY)
            await tier.close()

    run(body())


@pytest.mark.parametrize("length", [0, 1, 4096, 128 << 10, (8 << 20) + 4096])
def test_an_object_of_another_length_is_none(server: S3Server, tmp_path: Path, length: int) -> None:
    async def body() -> None:
        key, parts = made("one")
        async with opened(options(server, tmp_path)) as tier:
            assert await tier.put(key, parts, NOBODY)
            await asyncio.to_thread(server.request, "PUT", path_of(key), b"x" * length)
            assert await tier.contains([key]) == [length]
            assert not await tier.get(key, blank(parts))
            assert await tier.put(key, parts, NOBODY)
            assert await holds(tier, key, parts)

    run(body())


@pytest.mark.parametrize("extent_bytes", [4096, (1 << 20) + 4096, 9 << 20])
def test_objects_of_any_form_come_back_whole(server: S3Server, tmp_path: Path, extent_bytes: int) -> None:
    async def body() -> None:
        async with opened(options(server, tmp_path)) as tier:
            for ranks in (1, 2, 3):
                one = made((extent_bytes, ranks), extent_bytes, ranks)
                assert await tier.put(*one, NOBODY)
                assert await holds(tier, *one)

    run(body())


def test_a_missing_bucket_is_named_at_once_and_when_it_goes_missing(server: S3Server, tmp_path: Path) -> None:
    async def body() -> None:
        with pytest.raises(TierError, match=r"s3://not-there.*no such bucket"):
            async with opened({**options(server, tmp_path), "url": "s3://not-there"}):
                pass
        key, parts = made("one")
        async with opened(options(server, tmp_path)) as tier:
            await asyncio.to_thread(server.request, "DELETE", f"/{BUCKET}")
            for call in (tier.get(key, blank(parts)), tier.put(key, parts, NOBODY)):
                with pytest.raises(TierError, match="no such bucket"):
                    await call

    run(body())


def test_refused_credentials_are_named_and_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(server: S3Server) -> None:
        with pytest.raises(TierError, match="refused these credentials") as refused:
            async with opened({**options(server, tmp_path), "url": f"s3://{BUCKET}"}):
                pass
        assert "nobody checks it" not in str(refused.value)
        assert "tester" not in str(refused.value)

    monkeypatch.setenv("INITIAL_NO_AUTH_ACTION_COUNT", "1")  # the server checks all but the first request
    with s3_server(tmp_path / "s3") as server:
        run(body(server))


@contextlib.contextmanager
def nonsense(what: str, object_bytes: int) -> Iterator[int]:
    """The port of a server that answers all but listings with ``what``."""
    command = [sys.executable, str(Path(__file__).with_name("nonsense_http_server.py")), what, str(object_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline())
        finally:
            process.kill()
            process.wait(WAIT_S)


def talking_to(port: int, tmp_path: Path) -> dict[str, Any]:
    """Options for a server that is none."""
    (tmp_path / "secret").write_text("whatever\n")
    return {
        "type": "object",
        "url": f"s3://{BUCKET}",
        "endpoint": f"http://127.0.0.1:{port}",
        "allow_http": True,
        "access_key_id": "tester",
        "secret_access_key_file": str(tmp_path / "secret"),
        "timeout_s": 2,
    }


@pytest.mark.parametrize("what", SAID)
def test_nonsense_is_never_an_object(what: str, tmp_path: Path) -> None:
    async def body(port: int) -> None:
        async with opened(talking_to(port, tmp_path)) as tier:
            got: bool | None = None
            with contextlib.suppress(TierError):
                got = await tier.get(key, blank(parts))
            assert got in (None, False)

    key, parts = made("one")
    with nonsense(what, size(parts)) as port:
        run(body(port))


@pytest.mark.parametrize("what", ["full", "no-storage"])
def test_a_full_store_takes_no_more_and_says_so(what: str, tmp_path: Path) -> None:
    async def body(port: int) -> None:
        async with opened(talking_to(port, tmp_path)) as tier:
            assert not await tier.put(*made("one"), NOBODY)
            assert not await tier.put(*made("two", tenant=TENANT), Share(TENANT, 1 << 30))
            usage = await tier.usage()
            assert "full" in str(usage.problem)
            assert not any((usage.tenant_bytes or {}).values())

    with nonsense(what, 0) as port:
        run(body(port))


def test_a_limited_tenant_loses_its_own_oldest_and_another_server_counts_on(server: S3Server, tmp_path: Path) -> None:
    async def body() -> None:
        mine = [made(("mine", index), tenant=TENANT) for index in range(20)]
        others = made("other", tenant=OTHER)
        share = Share(TENANT, 5 * size(mine[0][1]))
        keys = [key for key, _ in mine]
        async with opened(options(server, tmp_path)) as one:
            assert await one.put(*others, Share(OTHER, 5 * size(others[1])))
            for each in mine[:10]:
                assert await one.put(*each, share)
            assert [found > 0 for found in await one.contains(keys)] == [False] * 5 + [True] * 5 + [False] * 10
        async with opened(options(server, tmp_path)) as two:
            assert await two.put(*mine[5], share)  # again: it is the youngest now, and counts once
            assert await two.put(*mine[10], share)
            assert [found > 0 for found in await two.contains(keys[5:11])] == [True, False, True, True, True, True]
            assert (await two.usage()).tenant_bytes == {TENANT: share.limit_bytes}
            await two.delete([keys[8]])
            assert await two.put(*mine[11], share)
            assert [found > 0 for found in await two.contains(keys[7:12])] == [True, False, True, True, True]
            assert not await two.put(*mine[0], Share(TENANT, size(mine[0][1]) - 1))
            assert await holds(two, *others)

    run(body())


def test_puts_of_one_tenant_at_once_stay_within_its_limit(server: S3Server, tmp_path: Path) -> None:
    async def body() -> None:
        mine = [made(("mine", index), tenant=TENANT) for index in range(24)]
        share = Share(TENANT, 5 * size(mine[0][1]))
        async with opened(options(server, tmp_path)) as tier:
            for start in range(0, len(mine), 8):
                await asyncio.gather(*(tier.put(*each, share) for each in mine[start : start + 8]))
            assert 0 < sum(await tier.contains([key for key, _ in mine])) <= 5 * size(mine[0][1])

    run(body())


def test_a_folder_that_is_deleted_holds_nothing_and_is_made_again(tmp_path: Path) -> None:
    async def body() -> None:
        key, parts = made("one")
        async with opened({"type": "object", "url": f"file://{tmp_path}/objects"}) as tier:
            assert await tier.put(key, parts, NOBODY)
            subprocess.run(["rm", "-r", str(tmp_path / "objects")], check=True)
            assert await tier.contains([key]) == [0]
            assert not await tier.get(key, blank(parts))
            await tier.delete([key])
            assert await tier.put(key, parts, NOBODY)
            assert await holds(tier, key, parts)

    run(body())


def test_a_store_in_memory_keeps_copies() -> None:
    async def body() -> None:
        key, parts = made("one", ranks=1)
        before = [memoryview(bytes(part)) for part in parts]
        async with opened({"type": "object", "url": "memory://"}) as tier:
            assert not tier.survives
            assert await tier.put(key, parts, NOBODY)
            for part in parts:
                part[:] = bytes(len(part))
            assert await holds(tier, key, before)

    run(body())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({}, "'url' is missing"),
        ({"url": "ftp://host/x"}, "'url' begins with"),
        ({"url": "s3:///prefix"}, "names no bucket"),
        ({"url": "s3://user:word@bucket"}, "nothing else"),
        ({"url": "s3://bucket?x=1"}, "nothing else"),
        ({"url": "file://host/x"}, "absolute path"),
        ({"url": "s3://bucket", "endpoint": "http://127.0.0.1:1"}, "'allow_http'"),
        ({"url": "s3://bucket", "endpoint": "https://user:word@host"}, "'endpoint'"),
        ({"url": "s3://bucket", "secret_access_key": "x"}, "process list"),
        ({"url": "file:///tmp/x", "region": "x"}, "unknown option 'region'"),
    ],
)
def test_a_wrong_option_is_named(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make_tier({"type": "object", **values})


@pytest.mark.parametrize(
    ("values", "backend", "place"),
    [
        ({"url": "s3://bucket/a/b"}, "s3", "s3://bucket/a/b"),
        ({"url": "gs://bucket"}, "gcs", "gs://bucket"),
        ({"url": "az://container/a", "account_name": "me"}, "azure", "az://container/a"),
        ({"url": "file:///var/kv"}, "local", "file:///var/kv"),
        ({"url": "memory://"}, "memory", None),
        ({"url": "s3://bucket", "endpoint": "https://s3.example"}, "s3", "s3://bucket at https://s3.example"),
    ],
)
def test_its_place_is_its_url(values: dict[str, Any], backend: str, place: str | None) -> None:
    tier = make_tier({"type": "object", **values})
    assert (tier.backend, tier.place) == (backend, place)
