"""The HTTP API as a client meets it."""

from __future__ import annotations

import http.client
import json

import pytest
from server_running import WAIT_S, Engines, Server

from lmcache_cli import api
from lmcache_cli._version import __version__

CLEAR = "/cache/clear"


def test_the_root_and_the_version_say_who_is_here(shared: Server) -> None:
    assert shared.ask("/") == (200, {"status": "ok", "service": "LMCache HTTP API"})
    assert shared.ask("/version") == (200, __version__)
    assert shared.ask("/healthcheck") == (200, {"status": "healthy"})


def test_the_status_is_read_whole_by_the_contract(shared: Server) -> None:
    status = shared.status()
    assert api.to_json(api.from_json(api.Status, status)) == status
    assert status["engine_type"] == api.ENGINE_TYPE
    assert status["storage_manager"]["l1_eviction_controller"]["eviction_policy"] == "LRU"


def test_the_settings_are_shown_and_nothing_of_the_environment(shared: Server) -> None:
    code, config = shared.ask("/config")
    assert code == 200
    assert (config["rpc_port"], config["chunk_tokens"], config["attach_path"]) == (
        shared.rpc_port,
        256,
        shared.attach_path,
    )
    assert "PATH" not in json.dumps(config)


def test_clear_drops_what_nobody_holds_and_says_how_much_stays(own: Server, engines: Engines) -> None:
    engine = engines(own)
    engine.store(["a", "b", "c"])
    engine.lookup(["a"])
    assert own.ask(CLEAR, b"")[1] == {"status": "ok", "cleared": {"tier": "l1", "num_entries": 2, "num_kept": 1}}
    assert own.ask(CLEAR, b'{"tier": "l1", "force": true}')[1]["cleared"]["num_entries"] == 0
    assert own.l1()["total_object_count"] == 1


@pytest.mark.parametrize(
    ("body", "code", "sentence"),
    [
        (b"{not json", 400, "the body is not valid JSON"),
        (b"\xff\xfe", 400, "the body is not valid JSON"),
        (b"[" * 60_000, 400, "the body is not valid JSON"),
        (b"[]", 422, "the body must be a JSON object"),
        (b'{"tier": "l2"}', 400, "tier 'l2' not supported; only 'l1'"),
        (b'{"force": 3}', 422, "force must be true or false"),
        (b'"' + b"x" * (65 << 10) + b'"', 413, "a body has at most 65536 bytes"),
    ],
)
def test_a_bad_body_gets_one_sentence(shared: Server, body: bytes, code: int, sentence: str) -> None:
    assert shared.ask(CLEAR, body) == (code, {"detail": sentence})


def test_garbage_on_the_http_port_hurts_nobody(shared: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", shared.http_port, timeout=WAIT_S)
    connection.connect()
    connection.sock.sendall(b"\x00\xff garbage\r\n\r\n")
    assert connection.sock.recv(100).startswith(b"HTTP/1.1 400")
    connection.close()
    assert shared.healthy()


def test_the_api_describes_itself(shared: Server) -> None:
    code, document = shared.ask("/openapi.json")
    assert code == 200
    assert {"/", "/healthcheck", "/status", "/version", "/config", "/metrics", CLEAR} <= set(document["paths"])
    assert {"Status", "Health", "ClearReply"} <= set(document["components"]["schemas"])


def test_every_metric_is_there_from_the_first_scrape(own: Server) -> None:
    _, text = own.ask("/metrics")
    for name in ("lookup_requested_tokens_total", "lookup_hit_tokens_total", "lookups_total", "refused_total"):
        assert f"lmcache_mp_{name} 0.0" in text
    for name in ("l1_memory_usage_bytes", "l1_usage_ratio", "evicted_chunks_total", "quarantined_chunks_total"):
        assert f"lmcache_mp_{name} " in text
