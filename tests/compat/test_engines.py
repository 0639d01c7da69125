"""Both command lines against one and the same serving engine: they read the same facts out of it."""

from __future__ import annotations

import json
from pathlib import Path

from scripted_engine import MODEL, Behaviour, ScriptedEngine
from server_running import Engine, Server
from worlds import ours, theirs


def test_both_pings_find_the_engine_healthy() -> None:
    with ScriptedEngine() as engine:
        for command_line in (ours, theirs):
            metrics = command_line("ping", "engine", "--url", engine.url, "--format", "json").metrics()
            assert metrics["status"] == "OK", command_line


def test_both_describes_name_the_same_model() -> None:
    with ScriptedEngine() as engine:
        described = [f("describe", "engine", "--url", engine.url, "--format", "json").metrics() for f in (ours, theirs)]
    assert [metrics["model"] for metrics in described] == [MODEL, MODEL]
    assert described[0]["max_context"] == described[1]["max_context"]


def test_both_queries_count_the_same_tokens() -> None:
    with ScriptedEngine(Behaviour(texts=("one ", "two ", "three"), gap_s=0.02)) as engine:
        words = ("query", "engine", "--url", engine.url, "--prompt", "count to three please", "--format", "json")
        answers = [command_line(*words) for command_line in (ours, theirs)]
    assert [answer.status for answer in answers] == [0, 0], answers
    our_metrics, their_metrics = (json.loads(answer.out)["metrics"] for answer in answers)
    assert our_metrics["prompt_tokens"] == their_metrics["prompt_tokens"]
    assert our_metrics["latency"]["output_tokens"] == their_metrics["output_tokens"] == 3
    assert our_metrics["answer"] == their_metrics["answer"] == "one two three"


def test_our_bench_replays_a_configuration_that_theirs_exported(tmp_path: Path) -> None:
    with ScriptedEngine() as engine:
        path = tmp_path / "bench.json"
        options = ["--engine-url", engine.url, "--workload", "random-prefill", "--rp-request-length", "64"]
        options += ["--rp-num-requests", "3", "--tokens-per-gb-kvcache", "1000", "--no-interactive"]
        exported = theirs("bench", "engine", *options, "--export-config", str(path))
        assert path.is_file(), exported
        engine.play()
        runs = tmp_path / "runs"
        replayed = ours(
            "bench", "engine", "--config", str(path), "--engine-url", engine.url, "--output-dir", str(runs),
            "--no-interactive", "--format", "json",
        )  # fmt: skip
        assert replayed.status == 0, replayed
        assert len(engine.asked()) >= 3


def test_their_bench_measures_our_engine_and_sizes_itself_by_our_server(
    our_server: Server, engine: Engine, tmp_path: Path
) -> None:
    assert engine.lookup(["a"], lease=False)
    layout = next(iter(our_server.status()["cache_context_meta"].values()))["kv_cache_layout"]
    options = ["--workload", "random-prefill", "--rp-request-length", "64", "--rp-num-requests", "3", "--model", "tiny"]
    options += ["--lmcache-url", f"http://127.0.0.1:{our_server.http_port}", "--no-interactive"]
    options += ["--output-dir", str(tmp_path)]
    path = tmp_path / "bench.json"
    with ScriptedEngine() as serving:
        exported = theirs("bench", "engine", "--engine-url", serving.url, *options, "--export-config", str(path))
        assert exported.status == 0, exported
        measured = theirs("bench", "engine", "--engine-url", serving.url, *options)
        assert measured.status == 0, measured
        assert len(serving.asked()) == 3
    assert json.loads(path.read_text())["tokens_per_gb_kvcache"] == 2**30 // layout["cache_size_per_token"]
