"""/quota and /cache/lookup on a real server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import urllib.error
import urllib.request
from typing import Any

import pytest
from server_running import EXTENT_BYTES, Engine, Engines, Server, eventually, key

from lmcache.errors import PeerRefused
from lmcache.keys import TENANT_SECRET_BYTES, extend, namespace, pack_tokens, request_namespace
from lmcache.server.tenants import LIMITS_MAX, NAMESPACES_MAX, Known, Tenants, TooMany
from lmcache.wire import messages as m
from lmcache_cli import api

CHUNK = 256
TOKENS = [(7 * index) % 1000 for index in range(5 * CHUNK + 17)]


def call(server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"http://127.0.0.1:{server.http_port}{path}"
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


SALTS = ["a", "a/b", "a?b", "a#b", "a b", "a%2Fb", "..", ".", "ü/日本", "%", "_default", "a=b&c", "x" * 256]


@pytest.mark.parametrize("salt", SALTS)
def test_every_salt_is_a_tenant_of_its_own(own: Server, salt: str) -> None:
    path = api.quota_path(salt)
    assert call(own, "GET", path)[1]["exists"] is False
    assert call(own, "PUT", path, {"limit_gb": 2.5})[1]["status"] == "ok"
    status, found = call(own, "GET", path)
    assert (status, found["limit_gb"], found["exists"], found["current_usage_gb"]) == (200, 2.5, True, 0.0)
    assert len(call(own, "GET", "/quota")[1]["users"]) == 1
    for other in [*SALTS, ""]:
        if other != salt:
            assert call(own, "DELETE", api.quota_path(other))[1]["status"] == "not_found", other
    assert call(own, "DELETE", path)[1]["status"] == "removed"
    assert call(own, "GET", "/quota")[1] == {"users": {}}


def test_the_empty_salt_and_one_called_default_are_two_tenants(own: Server) -> None:
    call(own, "PUT", api.quota_path(""), {"limit_gb": 1})
    call(own, "PUT", api.quota_path("_default"), {"limit_gb": 2})
    users = call(own, "GET", "/quota")[1]["users"]
    assert {name: user["limit_gb"] for name, user in users.items()} == {"_default": 1.0, "%5Fdefault": 2.0}
    assert call(own, "GET", "/quota/_default")[1]["limit_gb"] == 1.0


@pytest.mark.parametrize(
    "body",
    [
        *(b"{", [1], {}, {"limit_gb": "1"}, {"limit_gb": True}, {"limit_gb": -1}, {"limit_gb": 1, "x": 2}),
        *(b'{"limit_gb": NaN}', b'{"limit_gb": Infinity}', b'{"limit_gb": 1e999}'),
        b'{"limit_gb": 1' + b"0" * 400 + b"}",
    ],
)
def test_a_limit_that_is_none_is_refused_and_changes_nothing(own: Server, body: Any) -> None:
    status, answer = call(own, "PUT", "/quota/a", body)
    assert status == 400
    assert isinstance(answer["error"], str)
    assert call(own, "GET", "/quota")[1] == {"users": {}}


def test_limits_outlive_the_service_process(own: Server) -> None:
    call(own, "PUT", "/quota/a", {"limit_gb": 3})
    pid = own.service_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: own.service_pid() not in (None, pid) and own.healthy())
    assert call(own, "GET", "/quota/a")[1]["limit_gb"] == 3


def test_the_number_of_limits_and_of_namespaces_is_bounded() -> None:
    tenants = Tenants(bytes(TENANT_SECRET_BYTES))
    for index in range(LIMITS_MAX):
        assert tenants.limit(str(index), 1.0) is False
    with pytest.raises(TooMany):
        tenants.limit("one more", 1.0)
    assert tenants.limit("0", 2.0) is True
    for index in range(NAMESPACES_MAX + 5):
        tenants.meet(Known("m", "e", 1, f"{index:064x}"))
    known = json.loads(tenants.document(lambda _: 0))["known"]
    assert len(known) == NAMESPACES_MAX
    assert int(known[0]["namespace"], 16) == NAMESPACES_MAX + 4  # the newest first


def limit(server: Server, salt: str, extents: float) -> None:
    assert call(server, "PUT", f"/quota/{salt}", {"limit_gb": extents * EXTENT_BYTES / 2**30})[0] == 200


def extents_of(server: Server, salt: str) -> dict[str, float]:
    usage = call(server, "GET", f"/quota/{salt}")[1]["usage_by_tier_gb"]
    return {tier: used * 2**30 / EXTENT_BYTES for tier, used in usage.items()}


def test_a_limited_tenant_pushes_out_its_own_chunks_and_nobody_elses(own: Server, engines: Engines) -> None:
    engine = engines(own)
    limit(own, "small", 4)
    others: list[object] = [f"other {number}" for number in range(6)]
    engine.store(others, salt="other")
    first: list[object] = [f"first {number}" for number in range(4)]
    second: list[object] = [f"second {number}" for number in range(3)]
    assert engine.store(first, salt="small") == 4
    assert engine.store(second, salt="small") == 3
    assert extents_of(own, "small") == {"l1": 4.0}
    assert extents_of(own, "other") == {"l1": 6.0}
    assert engine.lookup(second).num_chunks == 3
    assert [engine.lookup([name], lease=False).num_chunks for name in first] == [1, 0, 0, 0]
    assert engine.lookup(others).num_chunks == 6


def test_more_than_a_limit_is_not_stored_and_the_answer_says_which_chunks(own: Server, engines: Engines) -> None:
    engine = engines(own)
    limit(own, "small", 2.5)
    granted = engine.reserve([f"chunk {number}" for number in range(4)], salt="small")
    assert list(granted.states) == [m.GRANTED, m.GRANTED, m.FULL, m.FULL]
    engine.call(m.Abort(0, ticket=granted.ticket))
    limit(own, "none", 0)
    assert engine.store(["nothing"], salt="none") == 0


def test_limits_hold_again_after_a_restart_of_the_server(own: Server, engines: Engines) -> None:
    limit(own, "small", 3)
    own.stop()
    own.start()
    assert call(own, "GET", "/quota/small")[1]["exists"] is True
    engine = engines(own)
    engine.store([f"chunk {number}" for number in range(3)], salt="small")
    engine.store(["one more"], salt="small")
    assert extents_of(own, "small") == {"l1": 3.0}
    own.kill()
    own.start()
    assert extents_of(own, "small") == {"l1": 3.0}  # adopted chunks are still somebody's
    call(own, "DELETE", "/quota/small")
    own.stop()
    own.start()
    assert call(own, "GET", "/quota/small")[1]["exists"] is False


def test_an_engine_may_not_ask_what_is_the_services(shared: Server, engines: Engines) -> None:
    engine = engines(shared)
    for request in (m.Peek(0, key(1)), m.Tenants(0), m.Limit(0, "a", 1.0)):
        with pytest.raises(PeerRefused) as refused:
            engine.call(request)
        assert refused.value.code == m.REFUSED_OWNER


def keys_of(base: bytes, salt: str) -> list[bytes]:
    return extend(request_namespace(base, salt, {}, CHUNK), pack_tokens(TOKENS), CHUNK)


def hold(engine: Engine, keys: list[bytes]) -> None:
    """Store something under each key."""
    granted = engine.call(m.Reserve(0, keys=b"".join(keys)))
    engine.call(m.Commit(0, ticket=granted.ticket, checksums=bytes(8 * granted.states.count(m.GRANTED))))


@pytest.fixture
def known(own: Server, engines: Engines) -> tuple[Engine, bytes]:
    """A worker, and the namespace that the scheduler beside it has registered."""
    base = namespace({"test": 1})
    scheduler = engines(own, register=False)
    scheduler.call(m.Register(0, "scheduler", "tiny", "mock 1", 0, 1, 0, (), (), base))
    return engines(own), base


def test_a_look_up_says_which_chunks_are_held(own: Server, known: tuple[Engine, bytes]) -> None:
    engine, base = known
    keys = keys_of(base, "")
    assert len(keys) == 5
    hold(engine, [keys[0], keys[1], keys[3]])
    status, answer = call(own, "POST", "/cache/lookup", {"token_ids": TOKENS})
    assert (status, answer["chunk_size"], answer["num_tokens"]) == (200, CHUNK, len(TOKENS))
    (model,) = answer["models"]
    assert (model["model_name"], model["engine"], model["held_tokens"]) == ("tiny", "mock 1", 2 * CHUNK)
    assert [chunk["tier"] for chunk in model["chunks"]] == ["l1", "l1", None, "l1", None]
    assert [chunk["first_token"] for chunk in model["chunks"]] == [0, 256, 512, 768, 1024]
    other = call(own, "POST", "/cache/lookup", {"token_ids": [1, *TOKENS[1:]]})[1]["models"][0]
    assert other["held_tokens"] == 0
    assert call(own, "POST", "/cache/lookup", {"token_ids": [1]})[1]["models"][0]["chunks"] == []


def test_another_tenant_sees_nothing(own: Server, known: tuple[Engine, bytes]) -> None:
    engine, base = known
    hold(engine, keys_of(base, "a"))
    for salt, expected in (("a", 5 * CHUNK), ("", 0), ("b", 0)):
        body = {"token_ids": TOKENS, "cache_salt": salt, "model_name": "tiny"}
        assert call(own, "POST", "/cache/lookup", body)[1]["models"][0]["held_tokens"] == expected


def test_a_look_up_leaves_no_trace(own: Server, known: tuple[Engine, bytes]) -> None:
    """Nothing is leased or counted, and the order of eviction is as it was: what is oldest still goes first."""
    engine, base = known
    keys = keys_of(base, "")
    hold(engine, keys)
    before = own.metric("lookups_total"), own.metric("leases_total"), own.status()["active_sessions"]
    for _ in range(3):
        call(own, "POST", "/cache/lookup", {"token_ids": TOKENS})
    assert (own.metric("lookups_total"), own.metric("leases_total"), own.status()["active_sessions"]) == before
    evicted_before = own.metric("evicted_chunks_total")
    number = 0
    while own.metric("evicted_chunks_total") == evicted_before:
        hold(engine, [key(("filler", number + index)) for index in range(64)])
        number += 64
        call(own, "POST", "/cache/lookup", {"token_ids": TOKENS})
        assert number < 100_000
    tiers = [c["tier"] for c in call(own, "POST", "/cache/lookup", {"token_ids": TOKENS})[1]["models"][0]["chunks"]]
    assert None in tiers


def test_an_engine_that_is_gone_is_still_known(own: Server) -> None:
    base = namespace({"test": 2})
    with contextlib.ExitStack() as stack:
        engines = Engines(stack)
        engines(own, register=False).call(m.Register(0, "scheduler", "gone", "mock 1", 0, 1, 0, (), (), base))
        hold(engines(own), keys_of(base, ""))
    (model,) = call(own, "POST", "/cache/lookup", {"token_ids": TOKENS})[1]["models"]
    assert (model["model_name"], model["held_tokens"]) == ("gone", 5 * CHUNK)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", 400),
        ([1], 422),
        ({}, 422),
        ({"token_ids": []}, 422),
        ({"token_ids": [-1]}, 422),
        ({"token_ids": [1 << 32]}, 422),
        ({"token_ids": [True]}, 422),
        ({"token_ids": [1.5]}, 422),
        ({"token_ids": [1], "model_name": 3}, 422),
        ({"token_ids": [1], "cache_salt": 3}, 422),
        ({"token_ids": [1], "cache_salt": "x" * 1000}, 422),
        ({"token_ids": [1], "model_name": "unheard-of"}, 404),
        (b" " * ((16 << 20) + 1), 413),
    ],
)
def test_a_look_up_that_makes_no_sense_gets_one_sentence(shared: Server, body: Any, code: int) -> None:
    status, answer = call(shared, "POST", "/cache/lookup", body)
    assert status == code
    assert isinstance(answer["detail"], str)
    assert shared.healthy()
