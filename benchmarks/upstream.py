"""Upstream's release, lmcache 0.5.6, under measurement: its server, and its own client classes as processes that obey.

The two ways in which a CPU engine's KV can reach its server without being pickled are its best modes: "lmcache_driven"
(the server maps the engine's KV, which is moved into POSIX shared memory, and copies) and "shm" (the engine copies into
the server's pool, ``--shm-name``). "pickle" is its default for a CPU. Usage telemetry is off; all else is as shipped.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import common

VERSION = "0.5.6"
MODES = ("lmcache_driven", "shm", "pickle")
ANSWER_S = 120.0
"""How long a client may take over one order, and to be ready."""
_ENVIRONMENT = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_DISABLE_BANNER": "1", "LMCACHE_LOG_LEVEL": "WARNING"}


def environment() -> dict[str, str]:
    """Ours without what points Python at our packages: both projects are the module ``lmcache``."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, **_ENVIRONMENT}


class Upstream(common.Started):
    """``lmcache server`` of upstream, on free ports of the loopback.

    Args:
        python: of an environment that has it.
        mode: one of ``MODES``.
        options: further options of its command line.
    """

    def __init__(self, folder: Path, python: str, l1_gb: float, mode: str, options: Sequence[str] = ()) -> None:
        self.python, self.mode, self.folder = python, mode, folder
        self.port, http_port = common.free_port(), common.free_port()
        self.url = f"http://127.0.0.1:{http_port}"
        log_path = folder / f"upstream-{self.port}.log"
        transfer = "lmcache_driven" if mode == "lmcache_driven" else "engine_driven"
        self._pool = f"lmcache_bench_{os.getpid()}_{self.port}" if mode == "shm" else ""
        command = [
            *(str(Path(python).parent / "lmcache"), "server", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--http-host", "127.0.0.1", "--http-port", str(http_port), "--prometheus-port", str(common.free_port())),
            *("--l1-size-gb", f"{l1_gb:g}", "--eviction-policy", "LRU", "--supported-transfer-mode", transfer),
            *(("--shm-name", self._pool, "--no-l1-use-lazy") if self._pool else ()),
            *options,
        ]
        start = time.monotonic()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
        self.ready_s = common.wait_for(f"{self.url}/healthcheck", self.process, log_path) - start

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._pool:
            Path("/dev/shm", self._pool).unlink(missing_ok=True)
        _sweep()


def _sweep() -> None:
    """Engines with upstream's connector leave the shared memory of their KV behind, 1 GiB each, when they are ended."""
    for path in Path("/dev/shm").glob("lmcache_kv_*"):
        pid = path.name.split("_")[2]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            path.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class KvShape:
    """KV memory of an engine on the host: K and V of each layer apart, in blocks, 16 bits an element.

    ``num_tokens`` is the longest prompt; there are blocks for two of them, one stored and one retrieved.
    """

    num_layers: int
    token_bytes: int
    num_tokens: int
    block_tokens: int = 16

    @property
    def total_bytes(self) -> int:
        """Bytes of the longest prompt."""
        return self.num_tokens * self.token_bytes


class Agent:
    """One client of an ``Upstream``: an order goes out, it is carried out and timed there, an answer comes back.

    ``Agents`` makes them. Orders and their answers are the methods of ``upstream_agent.Client``: ``ask("lookup",
    seed=1, num_tokens=4096)`` gives {"s": seconds, "hit_chunks": 16, "num_chunks": 16}.
    """

    def __init__(self, line: socket.socket) -> None:
        line.settimeout(ANSWER_S)
        self._socket = line
        self._line = line.makefile("rw")

    def greeted(self) -> None:
        """Wait until the client is registered."""
        self.chunk_tokens = int(self.finish()["chunk_tokens"])

    def ask(self, what: str, **details: object) -> dict[str, Any]:
        """Give an order and wait for its answer.

        Raises:
            RuntimeError: the client failed, with its error.
        """
        self.begin(what, **details)
        return self.finish()

    def begin(self, what: str, **details: object) -> None:
        """Give an order only."""
        print(json.dumps({"do": what, **details}), file=self._line, flush=True)

    def finish(self) -> dict[str, Any]:
        """The answer of the order that was given."""
        text = self._line.readline()
        if not text:
            raise RuntimeError("a client of upstream ended; see its log")
        answer: dict[str, Any] = json.loads(text)
        if "error" in answer:
            raise RuntimeError(f"a client of upstream failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """Let the client end."""
        with contextlib.suppress(OSError):
            self._line.close()
        self._socket.close()


class Agents:
    """``number`` clients of ``server``, each a process; a list of ``Agent`` while entered.

    Args:
        threads: of torch, which copies in the modes in which the client does.
    """

    def __init__(self, server: Upstream, shape: KvShape, number: int = 1, threads: int = 1) -> None:
        pairs = [socket.socketpair() for _ in range(number)]
        ends = [pair[1].fileno() for pair in pairs]
        command = [
            *(server.python, str(Path(__file__).with_name("upstream_agent.py")), "--mode", server.mode),
            *("--server", f"tcp://127.0.0.1:{server.port}", "--num-layers", str(shape.num_layers)),
            *("--token-bytes", str(shape.token_bytes), "--block-tokens", str(shape.block_tokens)),
            *("--num-tokens", str(shape.num_tokens), "--threads", str(threads), "--fds", *map(str, ends)),
        ]
        self._log = server.folder / f"upstream-clients-{server.port}.log"
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), pass_fds=ends)
        for pair in pairs:
            pair[1].close()
        self._agents = [Agent(pair[0]) for pair in pairs]

    def __enter__(self) -> list[Agent]:
        try:
            for agent in self._agents:
                agent.greeted()
        except BaseException:
            self.close()
            print(self._log.read_text(errors="replace")[-4000:])
            raise
        return self._agents

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all of them; they free their shared memory."""
        for agent in self._agents:
            agent.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
