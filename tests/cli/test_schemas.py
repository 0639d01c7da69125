"""The published schema of each command: its real output keeps it, in success and in failure, with no key too many."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import bench_runs
import jsonschema
import pytest
from documents import FIRST_GENERATION, STATUS
from scripted_engine import Behaviour, Script, ScriptedEngine
from serving import event_stream, json_answer, serve

from lmcache_cli.bench import summary
from lmcache_cli.bench.rundir import MEASURED, RunFolder

Run = Callable[..., Any]
FOLDER = files("lmcache_cli") / "schemas"
USAGE = {"usage": {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}}
CHUNK = {"index": 0, "first_token": 0, "num_tokens": 2, "tier": "l1"}
MODEL = {"model_name": "m", "engine": "e 1", "world_size": 1, "held_tokens": 2, "chunks": [CHUNK]}
SERVED = {
    "/healthcheck": json_answer({"status": "healthy"}),
    "/status": json_answer(STATUS),
    "/cache/clear": json_answer({"status": "ok", "cleared": {"tier": "l1", "num_entries": 3, "num_kept": 0}}),
    "/cache/lookup": json_answer({"chunk_size": 2, "num_tokens": 3, "models": [MODEL, {}]}),
    "/quota": json_answer({"users": {"a": {"limit_gb": 1, "current_usage_gb": None}}}),
    "/quota/a": json_answer(
        {"cache_salt": "a", "limit_gb": 1.5, "current_usage_gb": None, "exists": True, "status": "ok"}
    ),
    "/quota/b": json_answer({"cache_salt": "b", "status": "removed"}),
    "/health": json_answer({}),
    "/metrics": json_answer({}),
    "/v1/models": json_answer({"data": [{"id": "m", "max_model_len": 4096}]}),
    "/v1/completions": event_stream({"choices": [{"text": "a"}]}, {"choices": [{"text": "b"}]}, USAGE),
}
COMMANDS = {
    "ping_kvcache": "ping kvcache",
    "ping_engine": "ping engine",
    "describe_kvcache": "describe kvcache",
    "describe_engine": "describe engine",
    "kvcache_clear": "kvcache clear",
    "query_engine": "query engine --prompt hi",
    "query_kvcache": "query kvcache --token-ids 1,2,3",
    "quota_list": "quota list",
    "quota_get": "quota get a",
    "quota_set": "quota set a --limit-gb 1.5",
    "quota_delete": "quota delete b",
}


def check(name: str, text: str) -> Any:
    schema = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    document = json.loads(text)
    jsonschema.Draft202012Validator(schema).validate(document)
    return document


def check_strictly(name: str, text: str) -> Any:
    """As ``check``; and that no key may be missing, nor another one be there."""
    document = check(name, text)
    metrics = document["metrics"]
    for changed in ({**metrics, "surprise": 1}, *({k: metrics[k] for k in metrics if k != key} for key in metrics)):
        with pytest.raises(jsonschema.ValidationError):
            check(name, json.dumps({**document, "metrics": changed}))
    return document


@pytest.mark.parametrize("name", COMMANDS)
def test_a_success_keeps_the_schema(lmcache: Run, name: str) -> None:
    with serve(SERVED) as server:
        ended = lmcache(*COMMANDS[name].split(), "--url", server.url, "--format", "json")
    assert (ended.status, ended.err) == (0, "")
    check_strictly(name, ended.out)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("answers", [None, {}, dict.fromkeys(SERVED, json_answer({"detail": "no"}, 503))])
def test_a_failure_keeps_the_schema(lmcache: Run, name: str, answers: Any) -> None:
    words = (*COMMANDS[name].split(), "--format", "json")
    if answers is None:
        ended = lmcache(*words, "--url", "127.0.0.1:1")
    else:
        with serve(answers) as server:
            ended = lmcache(*words, "--url", server.url)
    assert ended.status == 1
    document = check(name, ended.out)
    assert document["metrics"]["status"] == "FAIL"
    assert document["error"]["message"]


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_keeps_the_schema(lmcache: Run, name: str) -> None:
    ended = lmcache(*COMMANDS[name].split(), "--url", "ftp://nowhere", "--format", "json")
    assert ended.status == 2
    assert check(name, ended.out)["error"]["code"] == "usage"


SPOILED = {"quarantined_count": 1, "quarantined": [{"key": "00" * 8, "rank": 1, "age_s": 2}, {}]}


@pytest.mark.parametrize(
    "status", [FIRST_GENERATION, {"is_healthy": False, "reason": "ill"}, {"storage_manager": {}}, SPOILED]
)
def test_any_servers_status_keeps_the_schema(lmcache: Run, status: Any) -> None:
    with serve({"/status": json_answer(status)}) as server:
        check("describe_kvcache", lmcache("describe", "kvcache", "--url", server.url, "--format", "json").out)


def test_repeating_keeps_the_schema(lmcache: Run) -> None:
    with serve(SERVED) as server:
        words = ("query", "engine", "--prompt", "hi", "--repeat", "2", "--url", server.url, "--format", "json")
        assert len(check("query_engine", lmcache(*words).out)["metrics"]["runs"]) == 2


@pytest.mark.parametrize("name", ["describe_kvcache", "ping_kvcache", "describe_engine"])
def test_watching_prints_one_object_a_line(name: str) -> None:
    with serve(SERVED) as server:
        words = [*COMMANDS[name].split(), "--url", server.url, "--format", "json", "--watch", "0.05"]
        command = [sys.executable, "-m", "lmcache_cli", *words]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            for _ in range(3):
                check(name, child.stdout.readline())
            child.terminate()


# --- bench (`bench engine` is in test_bench_engine, `bench server` in tests/server)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Make the folder of a run of twelve requests that each took so much longer."""

    def made(slower_s: float = 0.0, num_requests: int = 12, output_tokens: int | None = None) -> str:
        place = RunFolder(str(tmp_path), "long-doc-qa", bench_runs.CONFIG)
        times = [(float(i), i + 0.1 * (1 + i % 3) + slower_s) for i in range(num_requests)]
        outcomes = [
            bench_runs.outcome(str(i), sent, [first, first + 0.1], first + 0.2, output_tokens=output_tokens)
            for i, (sent, first) in enumerate(times)
        ]
        for each in outcomes:
            place.record(each, MEASURED)
        place.finish([], outcomes, summary.summarise(bench_runs.run(outcomes), None), lambda: "")
        return str(place.path)

    return made


def test_a_comparison_keeps_its_schema_whatever_it_finds(lmcache: Run, folder: Callable[..., str]) -> None:
    a = folder()
    for other, status in ((a, 0), (folder(0.5), 1), (folder(num_requests=1, output_tokens=1), 0)):
        ended = lmcache("bench", "compare", a, other, "--format", "json")
        assert ended.status == status
        document = check_strictly("bench_compare", ended.out)
        assert ("error" in document) == bool(document["metrics"]["worse"]) == (status == 1)


def test_a_comparison_that_cannot_be_made_keeps_its_schema(lmcache: Run, folder: Callable[..., str]) -> None:
    ended = lmcache("bench", "compare", folder(), "nowhere", "--format", "json")
    assert ended.status == 2
    assert check_strictly("bench_compare", ended.out)["error"]["code"] == "usage"


@pytest.mark.parametrize("points", [("--rates", "40,80"), ("--concurrencies", "1,2")])
@pytest.mark.parametrize(("behaviour", "status"), [(Behaviour(), 0), (Behaviour(status=503, body="{}"), 1)])
def test_a_sweep_keeps_its_schema_whatever_it_finds(
    lmcache: Run, tmp_path: Path, points: tuple[str, str], behaviour: Behaviour, status: int
) -> None:
    words = ("--workload", "random-prefill", "--rp-request-length", "60", "--rp-num-requests", "3", *points)
    with ScriptedEngine(behaviour) as engine:
        where = ("--engine-url", engine.url, "--output-dir", str(tmp_path))
        ended = lmcache("bench", "sweep", *where, *words, "--format", "json")
    assert ended.status == status, ended.err
    document = check_strictly("bench_sweep", ended.out)
    assert len(document["metrics"]["points"]) == 2
    assert ("error" in document) == (status == 1)


def test_a_sweep_that_cannot_be_carried_out_keeps_its_schema(lmcache: Run, tmp_path: Path) -> None:
    words = ("--workload", "random-prefill", "--output-dir", str(tmp_path), "--format", "json")
    with ScriptedEngine(script=Script(models=())) as engine:
        for more, code in ((("--rates", "1"), "bad_answer"), ((), "usage")):
            ended = lmcache("bench", "sweep", "--engine-url", engine.url, *words, *more)
            assert check_strictly("bench_sweep", ended.out)["error"]["code"] == code
