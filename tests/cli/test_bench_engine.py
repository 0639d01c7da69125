"""`lmcache bench engine` and `bench sweep` against a scripted engine: all workloads, all endings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from scripted_engine import Behaviour, Script, ScriptedEngine
from serving import Answer, json_answer, serve

Run = Callable[..., Any]

QUICK = Behaviour(texts=("a ", "b ", "c "), output_tokens=3, cached_tokens="prefix")
SLOW = Behaviour(texts=("a ",) * 50, gap_s=0.2)
PREFILL = ("--workload", "random-prefill", "--rp-request-length", "60", "--rp-num-requests", "4")
DOCUMENTS = (
    *("--workload", "long-doc-qa", "--kv-cache-volume", "3", "--tokens-per-gb-kvcache", "100"),
    *("--ldqa-document-length", "100", "--ldqa-max-output-length", "3"),
)
WORKLOADS = {
    "long-doc-qa": DOCUMENTS[2:],
    "multi-round-chat": (
        *("--kv-cache-volume", "1", "--tokens-per-gb-kvcache", "100", "--mrc-qps", "20", "--mrc-duration", "1"),
        *("--mrc-shared-prompt-length", "20", "--mrc-chat-history-length", "30", "--mrc-user-input-length", "5"),
    ),
    "long-doc-permutator": (
        "--ldp-context-length",
        "30",
        "--ldp-system-prompt-length",
        "20",
        "--ldp-num-permutations",
        "4",
    ),
    "prefix-suffix-tuner": ("--psf-context-length", "700", "--psf-thrash", "2", "--tokens-per-gb-kvcache", "700"),
    "random-prefill": PREFILL[2:],
}
SCHEMA = json.loads((files("lmcache_cli") / "schemas" / "bench_engine.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def engine_process() -> Iterator[ScriptedEngine]:
    with ScriptedEngine() as engine:
        yield engine


@pytest.fixture
def engine(engine_process: ScriptedEngine) -> ScriptedEngine:
    engine_process.play(QUICK)
    return engine_process


@pytest.fixture
def bench(lmcache: Run, engine: ScriptedEngine, tmp_path: Path) -> Run:
    """Run `bench engine` against the scripted engine, run folders below tmp_path."""

    def run(*words: str) -> Any:
        return lmcache("bench", "engine", "--engine-url", engine.url, "--output-dir", str(tmp_path / "out"), *words)

    return run


def document(ended: Any) -> dict[str, Any]:
    loaded = json.loads(ended.out)
    jsonschema.validate(loaded, SCHEMA, jsonschema.Draft202012Validator)
    assert isinstance(loaded, dict)
    return loaded


def folder(tmp_path: Path) -> Path:
    (only,) = (tmp_path / "out").iterdir()
    return only


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_runs_and_its_document_keeps_the_schema(bench: Run, engine: ScriptedEngine, name: str) -> None:
    ended = bench("--workload", name, *WORKLOADS[name], "--format", "json", *(["--timeout", "30"]))
    metrics = document(ended)["metrics"]
    assert ended.status == 0, ended.err
    assert metrics["num_requests"]["ok"] > 0
    sent = metrics["num_requests"]["ok"] + metrics["warmup"]["ok"]
    assert len(engine.asked()) == sent
    assert metrics["sizing"] == "tokenize"
    assert metrics["versions"]["engine"] == "0.0.scripted"


def test_an_engine_without_a_tokenizer_is_calibrated(bench: Run, engine: ScriptedEngine) -> None:
    counts = [Behaviour(body=json.dumps({"usage": {"prompt_tokens": count}})) for count in (104, 404)]
    engine.play(*counts, QUICK, script=Script(tokenize=False))
    assert document(bench(*PREFILL, "--format", "json"))["metrics"]["sizing"] == "calibrated"


def test_quiet_hides_progress_and_never_the_result(bench: Run) -> None:
    loud, quiet = bench(*PREFILL), bench(*PREFILL, "-q")
    assert "plan: random-prefill" in loud.err
    assert "measuring: 4/4" in loud.err
    assert quiet.err == ""
    for ended in (loud, quiet):
        assert "Successful requests:                                   4\n" in ended.out


def test_a_run_leaves_a_folder_whose_config_replays(bench: Run, tmp_path: Path) -> None:
    bench(*PREFILL, "-q", "--seed", "5")
    path = folder(tmp_path)
    assert {file.name for file in path.iterdir()} == {"config.json", "requests.jsonl", "summary.json", "report.html"}
    ended = bench("--config", str(path / "config.json"), "--format", "json", "-q")
    assert document(ended)["metrics"]["config"] == {
        key: value for key, value in json.loads((path / "config.json").read_text()).items() if key != "version"
    }


def test_the_same_seed_sends_the_same_prompts(bench: Run, engine: ScriptedEngine) -> None:
    def prompts(*words: str) -> set[str]:
        engine.play(QUICK)
        bench(*PREFILL, *words, "-q")
        return {str(asked.body["messages"]) for asked in engine.asked()}

    first = prompts()
    assert len(first) == 4
    assert prompts() == first
    assert not prompts("--seed", "43") & first


def test_a_dry_run_sends_nothing_and_makes_nothing(bench: Run, engine: ScriptedEngine, tmp_path: Path) -> None:
    ended = bench(*DOCUMENTS, "--dry-run", "--format", "json")
    plan = document(ended)["metrics"]["plan"]
    assert (plan["documents"], plan["num_requests"], plan["distinct_gb"]) == ({"documents": 3}, 6, 3.0)
    assert engine.paths() == []
    assert not (tmp_path / "out").exists()


def test_export_writes_the_settled_settings_and_runs_nothing(
    bench: Run, engine: ScriptedEngine, tmp_path: Path
) -> None:
    path = tmp_path / "bench.json"
    ended = bench(*DOCUMENTS, "--export-config", str(path), "--format", "json")
    assert document(ended)["metrics"]["replay"].endswith(f"--config {path}")
    written = json.loads(path.read_text())
    assert (written["model"], written["ldqa_document_length"]) == ("scripted", 100)
    assert engine.asked() == []
    again = bench("--config", str(path), "--export-config", str(tmp_path / "second.json"))
    assert again.status == 0
    assert json.loads((tmp_path / "second.json").read_text()) == written


def test_failed_requests_are_counted_by_cause_and_the_run_fails(bench: Run, engine: ScriptedEngine) -> None:
    engine.play(QUICK, Behaviour(body='{"detail": "too busy"}', status=503))
    ended = bench(*PREFILL, "--concurrency", "1", "--format", "json")
    loaded = document(ended)
    assert ended.status == 1
    assert loaded["error"]["code"] == "requests_failed"
    assert "too busy" in loaded["error"]["message"]
    assert loaded["metrics"]["failures"][0]["cause"] == "http_503"
    assert loaded["metrics"]["num_requests"] == {"ok": 1, "failed": 3, "cancelled": 0, "unsent": 0}
    assert len(engine.asked()) == 4  # nothing was sent again


def test_a_warm_up_that_fails_again_and_again_ends_the_run(bench: Run, engine: ScriptedEngine) -> None:
    engine.play(Behaviour(body="{}", status=500))
    ended = bench(*DOCUMENTS, "-q", "--format", "json")
    assert ended.status == 1
    assert "the warm-up failed: HTTP 500" in document(ended)["error"]["message"]
    assert len(engine.asked()) == 3


def test_without_warm_up_the_first_request_of_a_document_counts_as_cold(bench: Run) -> None:
    metrics = document(bench(*DOCUMENTS, "--no-warmup", "--format", "json"))["metrics"]
    assert metrics["warmup"] == {"ok": 0, "failed": 0}
    assert (metrics["ttft_cold_ms"]["num"], metrics["ttft_warm_ms"]["num"]) == (3, 3)


def test_an_open_loop_is_paced_as_asked(bench: Run) -> None:
    metrics = document(bench(*PREFILL, "--request-rate", "50", "--arrival", "constant", "--format", "json"))["metrics"]
    assert metrics["pacing"] == {"concurrency": None, "rate_per_s": 50.0, "arrival": "constant", "duration_s": None}
    assert metrics["rate"]["asked_per_s"] == 50.0


def test_max_duration_ends_the_sending_and_says_what_was_left(bench: Run, engine: ScriptedEngine) -> None:
    engine.play(Behaviour(first_s=0.3))
    words = ("--concurrency", "1", "--max-duration", "0.1", "--format", "json")
    numbers = document(bench(*PREFILL, *words))["metrics"]["num_requests"]
    assert numbers == {"ok": 1, "failed": 0, "cancelled": 0, "unsent": 3}


def test_headers_go_to_the_engine_and_into_no_file(bench: Run, engine: ScriptedEngine, tmp_path: Path) -> None:
    bench(*PREFILL, "--header", "X-Key=hush-hush", "--ignore-eos", "-q")
    asked = engine.asked()
    assert {request.headers["x-key"] for request in asked} == {"hush-hush"}
    assert {request.body["ignore_eos"] for request in asked} == {True}
    assert not [file for file in folder(tmp_path).iterdir() if b"hush-hush" in file.read_bytes()]


class Growing(dict[str, Answer]):
    """Answers of a server whose counters grow each time that they are read."""

    num_reads = 0

    def get(self, path: str, default: Any = None) -> Any:
        if path != "/metrics":
            return super().get(path, default)
        self.num_reads += 1
        hit, asked = 50 * self.num_reads, 100 * self.num_reads
        text = f"lmcache_mp_lookup_requested_tokens_total {asked}\nlmcache_mp_lookup_hit_tokens_total {hit}\n"
        return Answer(200, text.encode())


def test_the_servers_counters_are_taken_before_and_after(bench: Run) -> None:
    with serve(Growing({"/version": json_answer("9.9")})) as server:
        metrics = document(bench(*PREFILL, "--lmcache-url", server.url, "--format", "json"))["metrics"]
    assert metrics["server"]["delta"] == {"lookup_hit_tokens": 50.0, "lookup_requested_tokens": 100.0}
    assert metrics["server"]["hit_ratio"] == 0.5
    assert metrics["versions"]["server"] == "9.9"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("--workload", "nope"), 2, "'nope' is not one of"),
        (("--workload", "random-prefill", "--engine-url", "http://[::1"), 2, "is not an address"),
        (("--workload", "random-prefill", "--engine-url", "localhost:1"), 1, "cannot connect to http://localhost:1"),
        ((), 2, "missing: --workload"),
        (("--workload", "long-doc-qa", "--no-interactive"), 2, "missing: --tokens-per-gb-kvcache (or --lmcache-url)"),
        (("--workload", "random-prefill", "--config", "/does/not/exist"), 2, "cannot read --config"),
        (("--workload", "random-prefill", "--header", "nonsense"), 2, "--header: expected NAME=VALUE"),
        (
            ("--workload", "random-prefill", "--cacert", "/nowhere", "--engine-url", "https://localhost:1"),
            2,
            "--cacert",
        ),
        ((*PREFILL, "--export-config", "x", "--dry-run"), 2, "exclude each other"),
        ((*PREFILL, "--output", "/does/not/exist/x"), 2, "cannot write --output"),
    ],
)
def test_what_cannot_work_is_one_line_and_one_document(
    bench: Run, words: tuple[str, ...], status: int, said: str
) -> None:
    ended = bench(*words, "--format", "json")
    assert ended.status == status
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert document(ended)["error"]["message"] in ended.err.strip()


def test_a_missing_engine_url_is_an_error_and_the_environment_counts(
    lmcache: Run, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = ("bench", "engine", *PREFILL, "--output-dir", str(tmp_path), "-q")
    ended = lmcache(*words)
    assert (ended.status, ended.err) == (2, "lmcache: missing: --engine-url\n")
    monkeypatch.setenv("LMCACHE_ENGINE_URL", engine.url)
    assert lmcache(*words).status == 0


@pytest.mark.parametrize("body", ["<html>no</html>", '{"object": "list", "data": []}'])
def test_an_answer_that_lists_no_models_is_one_line(lmcache: Run, body: str, tmp_path: Path) -> None:
    with serve({"/v1/models": Answer(200, body.encode())}) as server:
        ended = lmcache("bench", "engine", "--engine-url", server.url, "--output-dir", str(tmp_path), *PREFILL, "-q")
    assert ended.status == 1
    assert ended.err.count("\n") == 1


def test_an_output_folder_that_cannot_be_written_costs_no_request(
    lmcache: Run, engine: ScriptedEngine, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    words = ("--engine-url", engine.url, "--output-dir", str(tmp_path / "file" / "below"), *PREFILL)
    ended = lmcache("bench", "engine", *words)
    assert ended.status == 2
    assert "cannot write --output-dir" in ended.err
    assert engine.asked() == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
def test_a_full_disk_loses_no_result(bench: Run) -> None:
    ended = bench(*PREFILL, "--output", "/dev/full", "--format", "json", "-q")
    assert ended.status == 1
    assert ended.err == "lmcache: cannot write --output /dev/full: No space left on device\n"
    assert document(ended)["metrics"]["num_requests"]["ok"] == 4


def begun(engine: ScriptedEngine, words: tuple[str, ...], num_asked: int, **more: Any) -> subprocess.Popen[str]:
    """A benchmark as a process of its own, once the engine has been asked so often."""
    command = [sys.executable, "-m", "lmcache_cli", "bench", *words, "--engine-url", engine.url]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
    deadline_s = time.monotonic() + 60
    while len(engine.asked()) < num_asked and time.monotonic() < deadline_s:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.skipif(sys.platform == "win32", reason="ctrl-C is sent as a signal")
@pytest.mark.parametrize(("words", "num_asked"), [(PREFILL, 4), (DOCUMENTS, 1)])
def test_ctrl_c_reports_what_was_done_and_writes_all_files(
    engine: ScriptedEngine, tmp_path: Path, words: tuple[str, ...], num_asked: int
) -> None:
    engine.play(SLOW)
    out = tmp_path / "out"
    process = begun(engine, ("engine", *words, "--output-dir", str(out), "--format", "json", "-q"), num_asked)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("lmcache: interrupted")
    loaded = json.loads(printed)
    jsonschema.validate(loaded, SCHEMA)
    assert loaded["metrics"]["is_interrupted"] is True
    assert {file.name for file in folder(tmp_path).iterdir()} >= {"summary.json", "report.html"}
    assert len((folder(tmp_path) / "requests.jsonl").read_text().splitlines()) == num_asked


def test_an_engine_that_dies_in_the_middle_leaves_the_results_so_far(tmp_path: Path) -> None:
    with ScriptedEngine(QUICK, QUICK, SLOW) as engine:
        words = ("engine", *PREFILL, "--concurrency", "1", "--output-dir", str(tmp_path / "out"), "--format", "json")
        process = begun(engine, words, 3)
        engine.close()
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert json.loads(printed)["metrics"]["num_requests"] == {"ok": 2, "failed": 2, "cancelled": 0, "unsent": 0}


def test_an_ascii_locale_is_no_reason_to_fail(
    process: Run, engine: ScriptedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    engine.play(QUICK, script=Script(models=("模型",)))
    ended = process("bench", "engine", "--engine-url", engine.url, "--dry-run", *DOCUMENTS[:-4])
    assert ended.status == 0
    assert "Traceback" not in ended.err


def test_a_sweep_makes_one_report_of_runs_with_texts_of_their_own(
    lmcache: Run, engine: ScriptedEngine, tmp_path: Path
) -> None:
    words = ("--engine-url", engine.url, "--output-dir", str(tmp_path / "out"), *PREFILL, "--concurrencies", "1,2")
    ended = lmcache("bench", "sweep", *words, "--format", "json")
    metrics = json.loads(ended.out)["metrics"]
    assert ended.status == 0, ended.err
    assert [point["value"] for point in metrics["points"]] == [1, 2]
    assert len({str(asked.body["messages"]) for asked in engine.asked()}) == 8
    names = {file.name for file in folder(tmp_path).iterdir()}
    assert {"sweep.json", "sweep.html"} < names
    assert len(names) == 4


@pytest.mark.parametrize(
    "words", [(), ("--rates", "1", "--concurrencies", "1"), ("--rates", "1", "--concurrency", "1"), ("--rates", "0")]
)
def test_a_sweep_needs_one_list_of_points(lmcache: Run, engine: ScriptedEngine, words: tuple[str, ...]) -> None:
    ended = lmcache("bench", "sweep", "--engine-url", engine.url, *PREFILL, *words)
    assert ended.status == 2
    assert ended.err.count("\n") == 1
    assert engine.asked() == []
