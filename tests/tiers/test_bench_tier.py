"""`lmcache bench tier` over real stores: what it measures is true, what is wrong it sees, and it leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

sys.path.append(str(Path(__file__).parents[1] / "server"))

from server_running import WAIT_S, eventually, free_ports

MAIN = "from lmcache.benchmark.tier_command import bench_tier as b; import sys; sys.exit(b.main(standalone_mode=False))"
SMALL = ("--num-tokens=512", "--bytes-per-token=4096", "--chunk-size=64")
CHUNKS, CHUNK_BYTES = 8, 64 * 4096
SCHEMA = json.loads((files("lmcache_cli") / "schemas" / "bench_tier.json").read_text(encoding="utf-8"))
OPERATIONS = ("store", "write", "lookup", "miss", "promote", "retrieve")
pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")


class Redis:
    """A redis-server on a port of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.port, _ = free_ports()
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
        with open(folder / "redis.log", "ab") as log:
            self.process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        eventually(lambda: self.say("ping") == "PONG", "redis answers")

    @property
    def adapter(self) -> str:
        """What --l2-adapter takes."""
        return json.dumps({"type": "redis", "host": "127.0.0.1", "port": self.port})

    def say(self, *words: str) -> str:
        """The answer to one command; empty where there is none."""
        command = ["redis-cli", "-p", str(self.port), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False).stdout.strip()

    def names(self) -> list[str]:
        """All keys."""
        return self.say("keys", "*").split()


@contextlib.contextmanager
def redis(folder: Path, *options: str) -> Iterator[Redis]:
    store = Redis(folder, *options)
    try:
        yield store
    finally:
        store.process.kill()
        store.process.wait(WAIT_S)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Redis]:
    with redis(tmp_path) as running:
        yield running


def start(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", MAIN, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=3 * WAIT_S)
    return process.returncode, out, err


def bench(*words: str) -> tuple[int, Any, str]:
    """Exit status, JSON document (which keeps the schema) and stderr."""
    status, out, err = result(start("--format=json", *words))
    return status, kept(out), err


def kept(out: str) -> Any:
    document = json.loads(out)
    jsonschema.validate(document, SCHEMA, jsonschema.Draft202012Validator)
    return document


def children(pid: int) -> list[int]:
    """Processes that this one has started and that still run."""
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def is_alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def family(process: subprocess.Popen[str]) -> list[int]:
    """The private server's processes, once they are both there."""
    core = eventually(lambda: children(process.pid), "the private server was started")[0]
    return [core, eventually(lambda: children(core), "its service was started")[0]]


def test_what_goes_through_the_tier_comes_back_right_and_nothing_stays(store: Redis) -> None:
    store.say("set", "somebody", "else")
    status, document, err = bench("--l2-adapter", store.adapter, "--passes=3", *SMALL)
    assert (status, err) == (0, "")
    metrics = document["metrics"]
    assert metrics["tier"]["type"] == "RedisL2Adapter"
    assert (metrics["num_passes"], metrics["num_passes_compared"], metrics["num_failures"]) == (3, 3, 0)
    chunks = metrics["chunks"]
    assert (chunks["num_stored"], chunks["num_kept"], chunks["num_removed"]) == (3 * CHUNKS,) * 3
    nothing = ("refused", "missing", "spoiled", "wrong", "wrong_passes", "call_failures", "timeouts", "left")
    assert {name: chunks[f"num_{name}"] for name in nothing} == dict.fromkeys(nothing, 0)
    for name in OPERATIONS:
        latency = metrics[name]["latency_ms"]
        assert 0 < latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
    for name in ("store", "write", "promote", "retrieve"):
        assert metrics[name]["num_operations"] == 3
        busy_s = metrics[name]["latency_ms"]["mean"] * 3 / 1e3
        rate = 3 * metrics["bytes_per_pass"] / (1 << 30) / busy_s
        assert metrics[name]["throughput_gb_per_s"] == pytest.approx(rate)
    assert metrics["write"]["latency_ms"]["max"] > metrics["store"]["latency_ms"]["max"]
    assert store.names() == ["somebody"]
    # the store's own books: as many objects came and went
    assert f"calls={3 * CHUNKS}," in next(
        line for line in store.say("info", "commandstats").splitlines() if line.startswith("cmdstat_get:")
    )


def test_the_schema_takes_no_key_more_and_none_less(store: Redis) -> None:
    _, document, _ = bench("--l2-adapter", store.adapter, "--passes=1", *SMALL)
    metrics = document["metrics"]
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for changed in ({**metrics, "surprise": 1}, *({k: metrics[k] for k in metrics if k != key} for key in metrics)):
        with pytest.raises(jsonschema.ValidationError):
            kept(json.dumps({**document, "metrics": changed}))


def test_the_table_has_its_title_and_its_width(store: Redis) -> None:
    status, out, err = result(start("--l2-adapter", store.adapter, "--duration=0.01", *SMALL))
    lines = out.splitlines()
    assert (status, err) == (0, "")
    assert lines[0] == " Tier Bench Result ".center(64, "=")
    assert {len(line) for line in lines} == {64}


def test_wrong_bytes_of_the_store_are_seen(store: Redis) -> None:
    stop = threading.Event()

    def destroy() -> None:
        while not stop.is_set():
            for key in store.names():
                store.say("setrange", key, "5000", "rot")

    vandal = threading.Thread(target=destroy)
    vandal.start()
    try:
        status, document, err = bench("--l2-adapter", store.adapter, "--passes=40", *SMALL)
    finally:
        stop.set()
        vandal.join()
    assert status == 1
    assert document["error"]["code"] == "wrong_bytes"
    assert document["metrics"]["chunks"]["num_spoiled"] > 0
    assert "spoiled" in err


def test_a_store_without_room_is_counted_and_no_pass_is_complete(tmp_path: Path) -> None:
    with redis(tmp_path, "--maxmemory", "3mb", "--maxmemory-policy", "noeviction") as full:
        status, document, err = bench("--l2-adapter", full.adapter, "--passes=2", *SMALL)
    assert status == 1
    chunks = document["metrics"]["chunks"]
    assert chunks["num_stored"] == 2 * CHUNKS
    assert chunks["num_refused"] > 0
    assert chunks["num_kept"] + chunks["num_refused"] == 2 * CHUNKS
    assert document["metrics"]["failures"]["missing"] > 0
    assert err.startswith("lmcache: no pass was completed: missing (")


def test_a_store_that_is_not_there_ends_it_with_one_sentence() -> None:
    port, _ = free_ports()
    status, document, err = bench("--l2-adapter", json.dumps({"type": "redis", "port": port}), *SMALL)
    assert status == 1
    assert "the tier cannot be used" in document["error"]["message"]
    assert err == f"lmcache: {document['error']['message']}\n"


def test_a_store_that_dies_on_the_way_ends_it_with_what_was_measured(store: Redis) -> None:
    process = start("--format=json", "--l2-adapter", store.adapter, "--passes=9999", *SMALL)
    eventually(lambda: len(store.names()) > 2 * CHUNKS)
    members = family(process)
    store.process.kill()
    status, out, err = result(process)
    metrics = kept(out)["metrics"]
    assert status == 1
    assert metrics["num_passes"] >= 2
    assert metrics["chunks"]["num_left"] is None
    assert metrics["chunks"]["left_reason"]
    assert "none in 30 s" in err
    assert not any(map(is_alive, members))


def test_ctrl_c_ends_with_what_was_measured_and_removes_it(store: Redis) -> None:
    process = start("--format=json", "--l2-adapter", store.adapter, "--duration=600", *SMALL)
    eventually(lambda: len(store.names()) > 2 * CHUNKS)
    members = family(process)
    process.send_signal(signal.SIGINT)
    status, out, err = result(process)
    document = kept(out)
    assert status == 130
    assert document["error"]["code"] == "interrupted"
    assert document["metrics"]["num_passes"] >= 1
    assert document["metrics"]["chunks"]["num_left"] == 0
    assert err == "lmcache: interrupted\n"
    assert store.names() == []
    assert not any(map(is_alive, members))


def test_a_benchmark_that_is_killed_takes_its_server_with_it(store: Redis) -> None:
    process = start("--l2-adapter", store.adapter, "--duration=600", *SMALL)
    members = family(process)
    words = Path(f"/proc/{members[0]}/cmdline").read_text().split("\0")
    folder = Path(words[words.index("--attach-path") + 1]).parent
    assert folder.is_dir()
    process.kill()
    process.communicate(timeout=WAIT_S)
    eventually(lambda: not any(map(is_alive, members)), "the private server has ended")
    eventually(lambda: not folder.exists(), "its folder is gone")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "give either --l2-adapter, or --l2-path with --l2-size-gb"),
        (("--l2-path=/tmp/x",), "--l2-path and --l2-size-gb go together"),
        (("--l2-adapter={",), "--l2-adapter is not valid JSON"),
        (("--l2-adapter=[]",), "--l2-adapter is a JSON object"),
        (('--l2-adapter={"type": "tape"}',), "unknown type 'tape'"),
        (('--l2-adapter={"type": "redis", "prot": 1}',), "unknown option 'prot'"),
        (('--l2-adapter={"type": "redis", "password": "x"}',), "would be seen in the process list"),
        (('--l2-adapter={"type": "redis"}', "--passes=1", "--duration=1"), "give either --passes or --duration"),
        (('--l2-adapter={"type": "redis"}', "--num-tokens=100"), "a multiple of --chunk-size, 256"),
        (('--l2-adapter={"type": "redis"}', "--bytes-per-token=4194304"), "is at most 1073741824 bytes"),
    ],
)
def test_what_cannot_work_gets_one_sentence(words: tuple[str, ...], sentence: str) -> None:
    status, document, err = bench(*words)
    assert status == 2
    assert sentence in document["error"]["message"]
    assert err == f"lmcache: {document['error']['message']}\n"


@pytest.mark.parametrize("exists", [True, False])
def test_a_folder_of_others_is_as_it_was(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "l2"
    if exists:
        folder.mkdir()
        (folder / "theirs").write_text("theirs")
    status, document, _ = bench(f"--l2-path={folder}", "--l2-size-gb=0.5", "--passes=2", *SMALL)
    assert status == 0
    assert document["metrics"]["tier"]["place"].startswith(f"{folder}{os.sep}lmcache-bench-")
    chunks = document["metrics"]["chunks"]
    assert (chunks["num_kept"], chunks["num_missing"], chunks["num_left"]) == (2 * CHUNKS, 0, 0)
    assert [path.name for path in tmp_path.rglob("*")] == (["l2", "theirs"] if exists else [])


def test_a_tier_that_keeps_nothing_is_refused() -> None:
    status, document, _ = bench('--l2-adapter={"type": "null"}', "--passes=1", *SMALL)
    assert status == 2
    assert document["error"]["message"].startswith("the tier takes 0 bytes, a pass 2097152")


def test_a_tier_smaller_than_a_pass_is_refused(tmp_path: Path) -> None:
    status, document, _ = bench(f"--l2-path={tmp_path}/l2", "--l2-size-gb=0.001", *SMALL)
    assert status == 2
    assert document["error"]["message"].startswith("the tier takes 1073741 bytes, a pass 2097152")
    assert list(tmp_path.iterdir()) == []
