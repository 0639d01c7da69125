"""Upstream's command line against our server: every row that it prints is true."""

from __future__ import annotations

import signal

import pytest
from server_running import EXTENT_BYTES, POOL_GB, Engine, Server, eventually
from worlds import Ended, theirs


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.http_port}"


def document(ended: Ended) -> dict[str, object]:
    """What they printed as JSON; their banner and log lines stand elsewhere."""
    metrics = ended.metrics()
    assert isinstance(metrics, dict)
    return metrics


def test_their_ping_finds_us_healthy(our_server: Server) -> None:
    ended = theirs("ping", "kvcache", "--url", url(our_server), "--format", "json")
    assert document(ended)["status"] == "OK"


def test_their_describe_shows_the_true_state_of_our_server(our_server: Server, engine: Engine) -> None:
    assert engine.lookup(["a", "b", "c"], lease=False)
    metrics = document(theirs("describe", "kvcache", "--url", url(our_server), "--format", "json"))
    models = metrics.pop("models")
    groups = metrics.pop("kernel_groups")
    used_ratio = 3 * EXTENT_BYTES / (POOL_GB * 2**30)
    assert metrics == {
        "health": "OK",
        "url": url(our_server),
        "engine_type": "LMCacheServer",
        "chunk_size": 256,
        "l1_capacity_gb": round(POOL_GB, 2),
        "l1_used_gb": f"{3 * EXTENT_BYTES / 2**30:.2f} ({used_ratio:.1%})",
        "eviction_policy": "LRU",
        "cached_objects": 3,
        "active_sessions": 0,
    }
    assert isinstance(models, list)
    assert isinstance(groups, list)
    assert [(model["model"], model["world_size"], model["num_layers"]) for model in models] == [("tiny", 1, 2)]
    (group,) = groups
    expected = {
        "model": "tiny",
        "kernel_group_idx": 0,
        "num_layers": 2,
        "tokens_per_block": 16,
        "dtype": "torch.float16",
        "is_mla": False,
        "attention_backend": "TEST",
        "engine_kv_shape": "NL",
        "engine_kv_concrete_shape": "2",
    }
    assert {key: group.get(key) for key in expected} == expected


def test_their_ping_fails_while_our_core_is_stopped(our_server: Server) -> None:
    our_server.process.send_signal(signal.SIGSTOP)
    eventually(lambda: our_server.ask("/healthcheck")[0] == 503, "the stopped core is noticed")
    ended = theirs("ping", "kvcache", "--url", url(our_server), "--format", "json")
    assert ended.status == 1, ended
    assert ended.document()["metrics"]["status"] == "FAIL"


def test_their_clear_empties_our_cache(our_server: Server, engine: Engine) -> None:
    assert our_server.l1()["total_object_count"] == 3
    ended = theirs("kvcache", "clear", "--url", url(our_server))
    assert ended.status == 0, ended
    assert our_server.l1()["total_object_count"] == 0
    assert len(engine.lookup(["a"], lease=False).offsets) == 0


@pytest.mark.parametrize("salt", ["alice", "_default"])
def test_their_quota_commands_work_against_us(our_server: Server, salt: str) -> None:
    where = ("--url", url(our_server))
    empty = document(theirs("quota", "list", *where, "--format", "json"))
    assert empty == {"info": "No quotas configured"}
    assert theirs("quota", "set", salt, "--limit-gb", "1.5", *where).status == 0
    assert our_server.ask(f"/quota/{salt}")[1]["limit_gb"] == 1.5
    got = document(theirs("quota", "get", salt, *where, "--format", "json"))
    assert (got["limit_gb"], got["exists"]) == (1.5, True)
    rows = document(theirs("quota", "list", *where, "--format", "json"))["quotas"]
    assert isinstance(rows, list)
    assert [row["limit_gb"] for row in rows] == [1.5]
    assert document(theirs("quota", "delete", salt, *where, "--format", "json"))["status"] == "removed"
    assert our_server.ask("/quota")[1] == {"users": {}}
    assert document(theirs("quota", "delete", salt, *where, "--format", "json"))["status"] == "not_found"
