"""`lmcache engine` and `lmcache demo` as typed: what goes wrong is one line and the right exit status."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from server_running import eventually

LMCACHE = [sys.executable, "-m", "lmcache_cli"]
TIMEOUT_S = 120


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run([*LMCACHE, *words], capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--lmcache", "nowhere"], "no address"),
        (["--model", "/does/not/exist"], "no model directory"),
        (["--max-model-len", "1000000"], "at most 16384"),
        (["--host", "no such host"], "no address of this machine"),
        (["--port", "0"], "--port"),
    ],
)
def test_a_setting_that_cannot_work_is_one_line_and_exit_2(words: list[str], says: str) -> None:
    done = run("engine", "--port", "18431", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_broken_model_directory_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    done = run("engine", "--port", "18431", "--model", str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "cannot be loaded" in done.stderr


def test_a_port_in_use_is_one_line_and_exit_1() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = run("engine", "--port", str(taken.getsockname()[1]))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "in use" in done.stderr


@pytest.mark.parametrize("command", ["engine", "demo"])
def test_without_transformers_the_extra_is_named(command: str) -> None:
    code = (
        f"import sys; sys.modules['transformers'] = None; from lmcache_cli.app import run; sys.exit(run(['{command}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "lmcache[engine]" in done.stderr


def test_the_help_of_neither_imports_anything_heavy() -> None:
    for command in ("engine", "demo"):
        code = (
            "import sys; from lmcache_cli.app import run; "
            f"status = run(['{command}', '-h']); "
            "heavy = sorted({'torch', 'transformers', 'fastapi', 'zmq', 'httpx'} & set(sys.modules)); "
            "sys.exit(heavy and repr(heavy) or status)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT_S)
        assert done.returncode == 0, done.stderr


def leftovers(folder: Path) -> list[str]:
    """Processes that name one of our commands and were started below ``folder``, and files there."""
    found = [str(path) for path in folder.iterdir()]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = (entry / "environ").read_bytes()
            except OSError:
                continue
            if f"TMPDIR={folder}".encode() in environment:
                found.append(entry.name)
    return found


def test_the_demo_reuses_answers_the_same_and_leaves_nothing_behind(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([*LMCACHE, "demo"], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if "to the first token" in line]
    assert [int(row.split()[-5]) for row in rows] == [0, 4096, 4096]
    assert "LMCache KV Cache Service" in done.stdout
    assert "three equal answers" in done.stdout
    assert leftovers(tmp_path) == []
    assert {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("lmcache-")} == set()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_demo_that_is_interrupted_stops_what_it_started(tmp_path: Path, number: int, status: int) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([*LMCACHE, "demo"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
    try:
        assert process.stdout is not None
        seen = b""
        while b"lmcache engine" not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        process.send_signal(number)
        rest, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == status, seen + rest
        assert b"Traceback" not in seen + rest
    finally:
        process.kill()
        process.wait()
    eventually(lambda: leftovers(tmp_path) == [], "nothing is left")
