"""The reference's samples, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from documents import STATUS
from serving import json_answer, serve

from lmcache_cli import api, render
from lmcache_cli.commands import describe, ping, query
from lmcache_cli.measured import Completion

GOLDEN = Path(__file__).parent / "golden"
SIBLINGS = {
    "l1_capacity_bytes",
    "l1_used_bytes",
    "l1_usage_ratio",
    "gpu_id_list",
    "pool_used_slots",
    "pool_capacity_slots",
}


def golden(name: str) -> str:
    return (GOLDEN / name).read_text(encoding="utf-8")


def without_siblings(document: Any) -> Any:
    if isinstance(document, dict):
        return {key: without_siblings(value) for key, value in document.items() if key not in SIBLINGS}
    return [without_siblings(item) for item in document] if isinstance(document, list) else document


@pytest.fixture
def described() -> render.Report:
    return describe.status_report(api.from_json(api.Status, STATUS), "http://localhost:8000")


@pytest.fixture
def completed() -> render.Report:
    # times under which TPOT by (last - first) / (n - 1) and its inverse print what the sample shows
    last_s = 0.02688 + 8 / 1100.64
    done = Completion("facebook/opt-125m", "It keeps KV.", 618, 9, None, 0.02688, last_s, total_s=0.03505)
    return query.completion_report([done])


@pytest.mark.parametrize(("form", "name"), [("terminal", "ping.txt"), ("json", "ping.json")])
def test_ping_prints_the_sample(form: str, name: str) -> None:
    assert render.render(ping.report("Ping KV Cache", "OK", 3.42), form) == golden(name)


def test_describe_prints_the_sample(described: render.Report) -> None:
    assert render.render(described, "terminal") == golden("describe.txt")


def test_describe_in_json_is_the_sample_and_numbers_beside_its_texts(described: render.Report) -> None:
    document = json.loads(render.render(described, "json"))
    assert json.dumps(without_siblings(document), indent=2) + "\n" == golden("describe.json")
    metrics = document["metrics"]
    assert metrics["l1_used_bytes"] == STATUS["storage_manager"]["l1_manager"]["memory_used_bytes"]
    assert metrics["l1_usage_ratio"] == 0.705
    assert metrics["models"][0]["gpu_id_list"] == [0, 1, 2, 3]
    assert metrics["l2_adapters"][0]["pool_used_slots"] == 480
    assert metrics["l2_adapters"][0]["pool_capacity_slots"] == 512


def test_query_prints_the_sample(completed: render.Report) -> None:
    assert render.render(completed, "terminal") == golden("query.txt")


def test_query_in_json_has_the_keys_of_the_reference(completed: render.Report) -> None:
    assert json.loads(render.render(completed, "json")) == {
        "title": "Query Engine",
        "metrics": {
            "model": "facebook/opt-125m",
            "prompt_tokens": 618,
            "cached_tokens": None,
            "latency": {
                "output_tokens": 9,
                "ttft_ms": 26.88,
                "tpot_ms_per_token": 0.91,
                "total_latency_ms": 35.05,
                "throughput_tokens_per_s": 1100.64,
            },
            "answer": "It keeps KV.",
        },
    }


def test_a_served_status_document_prints_the_sample(process: Any) -> None:
    with serve({"/status": json_answer(STATUS)}) as server:
        ended = process("describe", "kvcache", "--url", server.url)
    assert (ended.status, ended.err) == (0, "")
    lines = ended.out.splitlines()
    expected = golden("describe.txt").splitlines()
    expected[2] = f"URL:{server.url:>46}"
    assert lines == expected


def test_a_live_ping_prints_the_sample_but_for_its_time(process: Any) -> None:
    with serve({"/healthcheck": json_answer({"status": "healthy"})}) as server:
        ended = process("ping", "kvcache", "--url", server.url)
    assert (ended.status, ended.err) == (0, "")
    lines, expected = ended.out.splitlines(), golden("ping.txt").splitlines()
    assert float(lines[2].split()[-1]) > 0
    assert len(lines[2]) == 30
    assert lines[1].split() == ["Status:", "OK"]
    assert [lines[0], lines[3]] == [expected[0], expected[3]]
