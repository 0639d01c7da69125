"""`lmcache bench server` against real servers: what it measures is true, and what is wrong it sees."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from server_running import POOL_GB, WAIT_S, Engines, Server, eventually, running

MAIN = "from lmcache.benchmark.command import bench_server as b; import sys; sys.exit(b.main(standalone_mode=False))"
SMALL = ("--num-tokens=512", "--bytes-per-token=4096")
GB = 1 << 30
SCHEMA = json.loads((files("lmcache_cli") / "schemas" / "bench_server.json").read_text(encoding="utf-8"))


def start(url: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, "--rpc-url", url, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


def bench(url: str, *words: str) -> tuple[int, Any, str]:
    """Exit status, JSON document (which keeps the schema) and stderr."""
    status, out, err = result(start(url, "--format=json", *words))
    return status, kept(out), err


def kept(out: str) -> Any:
    document = json.loads(out)
    jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)
    return document


def test_everything_that_is_stored_is_found_and_comes_back_right(own: Server) -> None:
    status, document, err = bench(own.rpc, "--duration=0.5", *SMALL)
    assert (status, err) == (0, "")
    metrics = document["metrics"]
    passes = metrics["num_passes"]
    assert passes >= 2
    assert metrics["num_passes_compared"] == 2
    assert (metrics["num_failures"], metrics["num_wrong_chunks"], metrics["num_wrong_passes"]) == (0, 0, 0)
    assert metrics["failures"] == {}
    for name in ("lookup", "store", "retrieve"):
        assert metrics[name]["num_operations"] == passes
        latency = metrics[name]["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    busy_s = metrics["store"]["latency_ms"]["mean"] * passes / 1e3
    assert metrics["store"]["throughput_gb_per_s"] == pytest.approx(passes * 512 * 4096 / GB / busy_s)
    assert busy_s < metrics["duration_s"]
    # the server's own books agree, prompts that nobody asked for are not counted, and nothing is held
    assert own.metric("stored_chunks_total") == 2 * passes
    assert own.metric("retrieves_total") == passes
    assert own.metric("lookups_total") == 0
    eventually(lambda: own.status()["attached_processes"] == 0)
    assert own.status()["active_sessions"] == 0
    assert own.ask("/cache/clear", b"")[1]["cleared"]["num_kept"] == 0


def test_the_schema_takes_no_key_more_and_none_less(shared: Server) -> None:
    _, document, _ = bench(shared.rpc, "--duration=0.1", *SMALL)
    metrics = document["metrics"]
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for changed in ({**metrics, "surprise": 1}, *({k: metrics[k] for k in metrics if k != key} for key in metrics)):
        with pytest.raises(jsonschema.ValidationError):
            kept(json.dumps({**document, "metrics": changed}))


def test_the_table_has_its_title_and_its_width(shared: Server) -> None:
    status, out, err = result(start(shared.rpc, "--duration=0.1", *SMALL))
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0] == " Server Bench Result ".center(64, "=")
    assert {len(line) for line in lines} == {64}


def test_wrong_bytes_in_the_pool_are_seen(own: Server, engines: Engines) -> None:
    vandal = engines(own)
    stop = threading.Event()

    def destroy() -> None:
        while not stop.is_set():
            vandal.pool[:] = b"\xaa" * len(vandal.pool)

    thread = threading.Thread(target=destroy)
    thread.start()
    try:
        status, document, err = bench(own.rpc, "--duration=3", *SMALL)
    finally:
        stop.set()
        thread.join()
    assert status == 1
    assert document["error"]["code"] == "wrong_bytes"
    assert document["metrics"]["num_wrong_chunks"] > 0
    assert document["metrics"]["failures"]["wrong_checksum"] > 0
    assert "checksum" in err


def test_a_pool_without_room_is_named_and_nothing_done_is_a_failure(own: Server, engines: Engines) -> None:
    engine = engines(own)
    for number in range(int(POOL_GB * GB) // (512 * 65536) + 1):
        engine.reserve([(number, chunk) for chunk in range(512)])
    status, document, err = bench(own.rpc, "--duration=0.2", *SMALL)
    assert status == 1
    assert document["metrics"]["num_passes"] == 0
    assert set(document["metrics"]["failures"]) == {"pool_full"}
    assert document["metrics"]["store"]["latency_ms"]["p50"] is None
    assert err.startswith("lmcache: no pass was completed: pool_full (")


def test_a_server_that_dies_is_a_cause_and_what_was_measured_stays(tmp_path: Path) -> None:
    with running(str(tmp_path)) as server:
        process = start(server.rpc, "--format=json", "--duration=3", *SMALL)
        eventually(lambda: server.metric("retrieves_total") > 2)
        server.kill()
        status, out, err = result(process)
        metrics = kept(out)["metrics"]
        assert (status, err) == (0, "")
        assert metrics["num_passes"] > 2
        assert set(metrics["failures"]) <= {"no_answer", "not_attached"}
        assert metrics["num_failures"] == sum(metrics["failures"].values()) > 0


def test_ctrl_c_ends_with_what_was_measured(own: Server) -> None:
    process = start(own.rpc, "--format=json", "--duration=600", *SMALL)
    eventually(lambda: own.metric("retrieves_total") > 2)
    process.send_signal(signal.SIGINT)
    status, out, err = result(process)
    assert status == 130
    document = kept(out)
    assert document["error"]["code"] == "interrupted"
    assert document["metrics"]["num_passes"] >= 2
    assert err == "lmcache: interrupted\n"


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (("--num-tokens=100",), 2, "--num-tokens must be a multiple of the server's chunk of 256 tokens"),
        (("--bytes-per-token=4194304",), 2, "--num-tokens times --bytes-per-token is at most 1073741824 bytes"),
        (("--bytes-per-token=524288",), 1, "start the server with a smaller --chunk-size"),
        (("--rpc-url=http://localhost",), 2, "is no address such as tcp://localhost:5555"),
        (("--rpc-url=tcp://localhost:1",), 1, "no server answers there"),
    ],
)
def test_what_cannot_work_gets_one_sentence(shared: Server, words: tuple[str, ...], status: int, sentence: str) -> None:
    got, document, err = bench(shared.rpc, *words)
    assert got == status
    assert sentence in document["error"]["message"]
    assert err == f"lmcache: {document['error']['message']}\n"
    assert document["metrics"]["store"]["throughput_gb_per_s"] is None


def test_the_measured_time_ends_when_it_was_asked_to(shared: Server) -> None:
    started = time.monotonic()
    _, document, _ = bench(shared.rpc, "--duration=1", *SMALL)
    assert 1 <= document["metrics"]["duration_s"] <= time.monotonic() - started
