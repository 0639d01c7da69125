"""Our command line against real upstream servers, one of each generation that a client must tell apart."""

from __future__ import annotations

import json

import pytest
from worlds import L1_GB, L2_GB, UpstreamServer, ours

CLEAR_PATHS = {
    "0.4.2": "/api/clear-cache",
    "0.4.5": "/clear-cache",
    "0.5.0": "/clear-cache",
    "0.5.6": "/cache/clear",
}


def has_quotas(upstream: UpstreamServer) -> bool:
    """Whether that release has the quota API at all."""
    return upstream.get("/quota")[0] == 200


def test_ping_reaches_the_health_check_of_every_generation(upstream: UpstreamServer) -> None:
    metrics = ours("ping", "kvcache", "--url", upstream.url, "--format", "json").metrics()
    assert metrics["status"] == "OK"
    assert metrics["round_trip_time_ms"] > 0


def test_describe_says_what_the_server_was_started_with(upstream: UpstreamServer) -> None:
    metrics = ours("describe", "kvcache", "--url", upstream.url, "--format", "json").metrics()
    raw = upstream.get("/status" if upstream.get("/status")[0] == 200 else "/api/status")[1]
    assert metrics["health"] == "OK"
    assert metrics["url"] == upstream.url
    assert metrics["engine_type"] == raw["engine_type"]
    assert metrics["chunk_size"] == raw["chunk_size"] == 256
    assert metrics["l1_capacity_gb"] == L1_GB
    assert metrics["l1_used_gb"] == "0.00 (0.0%)"
    assert metrics["eviction_policy"] == "LRU"
    assert metrics["cached_objects"] == 0
    assert metrics["active_sessions"] == 0
    (adapter,) = metrics["l2_adapters"]
    assert adapter["type"] == "MockL2Adapter"
    assert adapter["health"] == "OK"
    assert adapter["stored_object_count"] == 0
    assert f"{L2_GB * 1024:.2f} MB" in adapter["used"]


def test_describe_leaves_no_row_of_the_overview_without_a_value(upstream: UpstreamServer) -> None:
    ended = ours("describe", "kvcache", "--url", upstream.url)
    assert ended.status == 0, ended
    overview, _, adapter = ended.out.partition("L2: MockL2Adapter")
    assert adapter, ended
    assert "N/A" not in overview


def test_clear_reaches_the_path_of_every_generation(upstream: UpstreamServer) -> None:
    assert ours("kvcache", "clear", "--url", upstream.url, "--format", "json").metrics()["status"] == "OK"
    assert f'"POST {CLEAR_PATHS[upstream.release]} HTTP/1.1" 200' in upstream.log()


@pytest.mark.parametrize("salt", ["alice", "a b?c#d%41", "Zoë", "_default"])
def test_a_quota_is_set_read_listed_and_deleted(upstream: UpstreamServer, salt: str) -> None:
    if not has_quotas(upstream):
        assert upstream.release == "0.4.2", "every other release has quotas"
        refused = ours("quota", "set", salt, "--limit-gb", "1.5", "--url", upstream.url)
        assert refused.status == 1, refused
        assert len(refused.err.strip().splitlines()) == 1, refused
        assert "404" in refused.err
        return
    where = ("--url", upstream.url, "--format", "json")
    assert ours("quota", "set", salt, "--limit-gb", "1.5", *where).metrics()["limit_gb"] == 1.5
    got = ours("quota", "get", salt, *where).metrics()
    assert (got["cache_salt"], got["limit_gb"], got["exists"]) == (salt, 1.5, True)
    listed = upstream.get("/quota")[1]["users"]
    assert [user["limit_gb"] for user in listed.values()] == [1.5]
    rows = ours("quota", "list", *where).metrics()["quotas"]
    assert [(row["cache_salt"], row["limit_gb"]) for row in rows] == [(name, 1.5) for name in listed]
    assert ours("quota", "delete", salt, *where).metrics()["status"] == "removed"
    assert upstream.get("/quota")[1]["users"] == {}
    assert ours("quota", "delete", salt, *where).metrics()["status"] == "not_found"


def test_query_kvcache_says_in_one_sentence_that_upstream_has_no_lookup(upstream: UpstreamServer) -> None:
    ended = ours("query", "kvcache", "--token-ids", "1,2,3", "--url", upstream.url, "--format", "json")
    assert ended.status == 1, ended
    (line,) = ended.err.strip().splitlines()
    assert "cannot look prompts up" in line
    assert json.loads(ended.out)["error"]["message"] in line
