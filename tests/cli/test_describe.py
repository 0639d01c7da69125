"""`lmcache describe kvcache`: servers of every generation, half a document, something else entirely."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
from documents import FIRST_GENERATION, STATUS
from serving import Answer, json_answer, serve

from lmcache_cli.client import transport

Run = Callable[..., Any]


@pytest.fixture
def describe(lmcache: Run) -> Run:
    """Describe a server that answers /status with this document."""

    def run(document: Any, *words: str) -> Any:
        with serve({"/status": json_answer(document)}) as server:
            return lmcache("describe", "kvcache", "--url", server.url, *words)

    return run


def metrics(ended: Any) -> Any:
    return json.loads(ended.out)["metrics"]


def changed(**storage: Any) -> dict[str, Any]:
    document = copy.deepcopy(STATUS)
    document["storage_manager"].update(storage)
    return document


def test_the_first_generation_of_servers_prints_the_same_rows(describe: Run) -> None:
    present, first = describe(STATUS), describe(FIRST_GENERATION)
    assert first.status == 0
    assert first.out.splitlines()[3:] == present.out.splitlines()[3:]


def test_the_middle_generation_keeps_its_block_size_and_shape(describe: Run) -> None:
    group = {"num_layers": 4, "physical_block_size": 32, "gpu_kv_shape": "NL x [NB]", "dtype": "torch.bfloat16"}
    meta = {"7": {"model_name": "m", "world_size": 1, "kv_cache_layout": {"num_blocks": 9, "kernel_groups": [group]}}}
    (model,) = metrics(describe({"is_healthy": True, "cache_context_meta": meta}, "--format", "json"))["models"]
    assert (model["block_size"], model["gpu_kv_shape"], model["num_blocks"]) == (32, "NL x [NB]", 9)
    assert model["gpu_ids"] is None  # the key is an instance there, not a GPU


def test_several_pools_are_summed(describe: Run) -> None:
    pool = {"memory_total_bytes": 2**30, "memory_used_bytes": 2**29, "total_object_count": 5}
    document = changed(l1_managers={"a": pool, "b": pool}, l1_eviction_controllers={"a": {"eviction_policy": "ARC"}})
    del document["storage_manager"]["l1_manager"], document["storage_manager"]["l1_eviction_controller"]
    shown = metrics(describe(document, "--format", "json"))
    assert shown["l1_used_gb"] == "1.00 (50.0%)"
    assert (shown["l1_capacity_gb"], shown["cached_objects"], shown["eviction_policy"]) == (2.0, 10, "ARC")


def test_what_a_server_does_not_say_is_not_available(describe: Run) -> None:
    ended = describe({"is_healthy": True})
    assert ended.status == 0
    values = {line.split(":")[0]: line.split()[-1] for line in ended.out.splitlines()[3:-1]}
    assert set(values.values()) == {"N/A"}
    assert len(values) == 7


def test_lists_are_there_when_they_are_empty(describe: Run) -> None:
    shown = metrics(describe({"is_healthy": True}, "--format", "json"))
    assert (shown["models"], shown["l2_adapters"]) == ([], [])
    assert shown["engine_type"] is None
    assert shown["l1_used_gb"] is None


@pytest.mark.parametrize(
    "nonsense",
    [
        {"is_healthy": "yes", "storage_manager": [], "cache_context_meta": 3},
        {"is_healthy": True, "storage_manager": {"l1_manager": "x", "l2_adapters": {"a": 1}, "l1_managers": {"a": 1}}},
        {"is_healthy": True, "cache_context_meta": {"a": None, "b": {"kv_cache_layout": {"kernel_groups": [1, None]}}}},
        {"is_healthy": True, "gpu_context_meta": {"0": {"kv_cache_layout": {"hidden_dim_sizes": []}}}},
        {"is_healthy": True, "storage_manager": {"l2_adapters": [None, {"type": 7, "pool_size": 0, "backend": {}}]}},
        {"is_healthy": True, "storage_manager": {"l1_manager": {"memory_usage_ratio": float("nan")}}},
    ],
)
def test_values_of_the_wrong_type_count_as_absent(describe: Run, nonsense: Any) -> None:
    for form in ("terminal", "json"):
        ended = describe(nonsense, "--format", form)
        assert (ended.status, ended.err) == (0, "")
    assert "NaN" not in ended.out


def test_ranks_of_one_model_are_one_section_with_all_their_gpus(describe: Run) -> None:
    document = copy.deepcopy(STATUS)
    document["cache_context_meta"]["other"] = {"model_name": "other", "world_size": 1}
    first, second = metrics(describe(document, "--format", "json"))["models"]
    assert (first["gpu_ids"], first["gpu_id_list"]) == ("0, 1, 2, 3", [0, 1, 2, 3])
    assert (second["model"], second["gpu_ids"], second["gpu_id_list"]) == ("other", None, [])


def test_several_kernel_groups_show_the_first_and_list_all(describe: Run) -> None:
    document = copy.deepcopy(STATUS)
    for meta in document["cache_context_meta"].values():
        groups = meta["kv_cache_layout"]["kernel_groups"]
        meta["kv_cache_layout"]["kernel_groups"] = [*groups, {**groups[0], "kernel_group_idx": 1, "num_layers": 20}]
    (model,) = metrics(describe(document, "--format", "json"))["models"]
    assert model["num_layers"] == 80
    assert [group["num_layers"] for group in model["kernel_groups"]] == [80, 20]
    assert "kernel_groups" not in metrics(describe(STATUS, "--format", "json"))["models"][0]


def test_an_adapter_with_bytes_instead_of_slots_shows_them(describe: Run) -> None:
    disk = {"type": "FS", "base_path": "/kv", "current_size_bytes": 1023, "max_capacity_bytes": 2**20}
    (adapter,) = metrics(describe(changed(l2_adapters=[disk]), "--format", "json"))["l2_adapters"]
    assert adapter["used"] == "1023 B / 1.00 MB (0.1%)"
    assert (adapter["used_bytes"], adapter["capacity_bytes"], adapter["base_path"]) == (1023, 2**20, "/kv")
    assert (adapter["health"], adapter["pool_used"]) == (None, None)


def test_quarantined_chunks_are_shown_where_there_are_any(describe: Run) -> None:
    spoiled = {"key": "00ff" * 4, "namespace": "ab" * 8, "rank": None, "found_at": "promotion", "tier": "disk"}
    named = [{**spoiled, "age_s": 12.4}, {"key": "11" * 8, "rank": 2, "found_at": "use", "tier": "l1", "age_s": 3e6}]
    document = {**STATUS, "quarantined_count": 7, "quarantined": named}
    without, shown = (describe(each).out.splitlines()[3:] for each in (STATUS, document))
    assert shown[: len(without) - 1] == without[:-1]
    heading, count, first, second, _ = shown[len(without) - 1 :]
    assert heading.strip("-") == " Quarantined "
    assert count.split() == ["Taken", "out", "at", "use:", "7"]
    assert first.split(maxsplit=1) == ["00ff00ff00ff00ff:", "disk, at promotion, 12 s ago"]
    assert second.split(maxsplit=1) == ["1111111111111111:", "l1, at use, rank 2, 3000000 s ago"]
    listed = metrics(describe(document, "--format", "json"))
    assert (listed["quarantined_count"], listed["quarantined"][0]) == (7, {**spoiled, "age_s": 12.4})
    assert listed["quarantined"][1]["namespace"] is None
    for none in ({}, {"quarantined_count": 7}, {"quarantined": []}, {"quarantined": "x"}):
        assert describe({**STATUS, **none}).out.splitlines()[3:] == without
        assert "quarantined" not in metrics(describe({**STATUS, **none}, "--format", "json"))


def test_an_unhealthy_service_is_described_and_fails(describe: Run) -> None:
    ended = describe({**STATUS, "is_healthy": False})
    assert ended.status == 1
    assert ended.out.splitlines()[1].split() == ["Health:", "UNHEALTHY"]
    assert ended.err.endswith("says that it is not healthy\n")
    ended = describe({**STATUS, "is_healthy": False, "reason": "the core is silent"})
    assert ended.err.endswith("says that it is not healthy: the core is silent\n")
    document = json.loads(describe({**STATUS, "is_healthy": False}, "--format", "json").out)
    assert (document["metrics"]["health"], document["error"]["code"]) == ("UNHEALTHY", "unhealthy")


def test_an_unhealthy_adapter_alone_is_no_failure(describe: Run) -> None:
    ended = describe(changed(l2_adapters=[{"type": "FS", "is_healthy": False}]))
    assert ended.status == 0
    assert "UNHEALTHY" in ended.out


def test_a_model_name_cannot_break_the_table(describe: Run) -> None:
    meta = {"1": {"model_name": "模型\n====\x1b]0;x\x07", "world_size": 1}}
    lines = describe({"is_healthy": True, "cache_context_meta": meta}).out.splitlines()
    assert lines[10] == r"--------- Model: 模型\n====\x1b]0;x\x07 ----------"
    assert lines[11] == r"Model:" + " " * 22 + r"模型\n====\x1b]0;x\x07"


@pytest.mark.parametrize(
    ("answers", "code", "said"),
    [
        ({}, "http_404", "HTTP 404 Not Found from {url}/status: Not Found"),
        (
            {"/status": json_answer({"error": "starting"}, 503)},
            "http_503",
            "503 Service Unavailable from {url}/status: st",
        ),
        ({"/status": Answer(body=b"<html>")}, "bad_answer", "{url}/status answers is not JSON"),
        ({"/status": Answer(body=b"[" * 100_000)}, "bad_answer", "{url}/status answers is not JSON"),
        ({"/status": json_answer([1])}, "bad_answer", "{url}/status answers is not a JSON object"),
        ({"/status": json_answer({"hello": "world"})}, "bad_answer", "{url}/status answers is no LMCache status"),
    ],
)
def test_an_answer_that_is_no_status_is_one_line(
    lmcache: Run, answers: dict[str, Answer], code: str, said: str
) -> None:
    with serve(answers) as server:
        ended = lmcache("describe", "kvcache", "--url", server.url)
        assert (ended.status, ended.out) == (1, "")
        assert said.format(url=server.url) in ended.err
        assert ended.err.count("\n") == 1
        ended = lmcache("describe", "kvcache", "--url", server.url, "--format", "json")
    document = json.loads(ended.out)
    assert (document["title"], document["metrics"]["status"]) == ("LMCache KV Cache Service", "FAIL")
    assert document["metrics"]["health"] is None
    assert document["error"]["code"] == code


@pytest.mark.parametrize(
    "answers",
    [
        {"/v1/models": json_answer({"object": "list", "data": [{"id": "m"}]})},
        {"/v1/models": json_answer({"error": "Unauthorized"}, 401)},
        {"/health": Answer()},
    ],
)
@pytest.mark.parametrize("words", [("describe", "kvcache"), ("kvcache", "clear")])
def test_an_engine_is_recognised_and_the_usual_port_suggested(
    lmcache: Run, answers: dict[str, Answer], words: tuple[str, str]
) -> None:
    with serve(answers) as server:
        ended = lmcache(*words, "--url", f"{server.url}/v1")
    assert ended.status == 1
    assert f"{server.url} is a serving engine" in ended.err
    assert "try --url http://127.0.0.1:8080" in ended.err


def test_an_answer_without_end_is_given_up(lmcache: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "BODY_BYTES_MAX", 1 << 20)
    with serve({"/status": Answer(pieces=(b"[" + b"0," * 2**15,) * 64)}) as server:
        ended = lmcache("describe", "kvcache", "--url", server.url)
    assert ended.status == 1
    assert "longer than 1 MiB" in ended.err


def test_an_answer_that_stops_in_the_middle_is_a_failure(lmcache: Run) -> None:
    cut = Answer(pieces=(b'{"is_healthy"',), headers={"Content-Length": "500"})
    with serve({"/status": cut}) as server:
        ended = lmcache("describe", "kvcache", "--url", server.url)
    assert ended.status == 1
    assert "closed the connection without a complete answer" in ended.err


def test_a_proxy_is_never_used_for_this_machine(lmcache: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with serve({"/status": json_answer(STATUS)}) as server:
        assert lmcache("describe", "kvcache", "--url", server.url).status == 0
