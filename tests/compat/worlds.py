"""Processes of both worlds: upstream's servers and command line, and our own command line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server_running import free_ports

START_S = 120.0
COMMAND_S = 120.0
L1_GB = 0.25
L2_GB = 0.125
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def upstream_pythons() -> dict[str, str]:
    """Interpreters by release, and `cli`: what scripts/upstream_env.py made; the gate hands them over."""
    pythons = json.loads(os.environ.get("LMCACHE_TEST_UPSTREAM", "null"))
    assert isinstance(pythons, dict), "these tests need the environments of `nox -s compat`"
    return pythons


def environment() -> dict[str, str]:
    """For child processes: no proxy, no setting of ours, no report to upstream, no search path but their own."""
    dropped = re.compile(r"(LMCACHE_|OPENAI_).*|PYTHONPATH|NO_COLOR|(http|https|all|no)_proxy", re.IGNORECASE)
    kept = {name: value for name, value in os.environ.items() if not dropped.fullmatch(name)}
    return {**kept, "LMCACHE_TRACK_USAGE": "false", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    status: int
    out: str
    err: str

    def document(self) -> Any:
        """The JSON on stdout."""
        assert self.status in (0, 1), self
        return json.loads(self.out)

    def metrics(self) -> dict[str, Any]:
        """`metrics` of the JSON on stdout of a command that succeeded."""
        assert self.status == 0, self
        metrics = self.document()["metrics"]
        assert isinstance(metrics, dict)
        return metrics


def ours(*words: str) -> Ended:
    """Our command line."""
    source = {name: os.environ[name] for name in ("PYTHONPATH",) if os.environ.get(name)}
    return _run([sys.executable, "-m", "lmcache_cli", *words], {**environment(), **source})


def theirs(*words: str) -> Ended:
    """Upstream's thin command line."""
    program = Path(upstream_pythons()["cli"]).with_name("lmcache")
    return _run([str(program), *words], environment())


def _run(command: list[str], env: dict[str, str]) -> Ended:
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S, env=env)
    return Ended(done.returncode, _COLOUR.sub("", done.stdout), _COLOUR.sub("", done.stderr))


class UpstreamServer:
    """A running upstream server of one release, with an L2 adapter that keeps objects in its own memory."""

    def __init__(self, release: str, folder: Path) -> None:
        self.release = release
        rpc_port, self._http_port = free_ports()
        _, metrics_port = free_ports()
        self.url = f"http://127.0.0.1:{self._http_port}"
        self._log_path = folder / f"upstream-{release}.log"
        adapter = json.dumps({"type": "mock", "max_size_gb": L2_GB, "mock_bandwidth_gb": 1})
        command = [upstream_pythons()[release], str(Path(__file__).with_name("upstream_server.py"))]
        command += ["--port", str(rpc_port), "--http-port", str(self._http_port), "--l1-size-gb", str(L1_GB)]
        command += ["--no-l1-use-lazy", "--eviction-policy", "LRU", "--l2-adapter", adapter]
        command += ["--prometheus-port", str(metrics_port)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=folder)
        deadline = time.monotonic() + START_S
        while self.get("/")[0] == 0:
            assert self._process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def log(self) -> str:
        """All that it wrote, requests included."""
        return self._log_path.read_text(errors="replace")

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON body of a request of ours; status 0 when there is no answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as reply:
                return reply.status, json.loads(reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())
        except OSError:
            return 0, None

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(20)


@contextlib.contextmanager
def upstream_server(release: str, folder: Path) -> Iterator[UpstreamServer]:
    """A server that is gone at the end."""
    server = UpstreamServer(release, folder)
    try:
        yield server
    finally:
        server.stop()
