"""A server of our own with one tier: a child process on free ports of loopback, gone when the benchmark is."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from lmcache_cli import api

HOST = "127.0.0.1"
START_S = 30.0
L1_S = 300.0
"""How long the machine may take to hand out the memory of L1."""

OPEN_S = 25.0
"""How long a tier may take until it is in use: its own deadline for opening, and time to try once more."""

ANSWER_S = 10.0
STOP_S = 15.0
"""A server that stops writes to its tiers for up to ten seconds first."""

LOG_BYTES = 4096
PAUSE_S = 0.05
TRIES_MAX = 2
"""Failed attempts to open a tier after which it is no use waiting."""

_PREFIX = "lmcache_mp_l2_"
_LINE = re.compile(rf"{_PREFIX}(\w+?)(?:_total)?\{{[^}}]*\}} (\S+)")
_CORE_LINE = re.compile(r"^lmcache_mp_(\w+) (\S+)$", re.MULTILINE)
_SERVER_TOKEN = re.compile(r"LMCACHE_[A-Z]+_TOKEN")
_STAMP = re.compile(r"^[\d-]+ [\d:,]+ \w+ [\w.]+: ")


class ServerFailed(Exception):
    """The private server, or its tier, is no use; a sentence says why."""


@dataclass(frozen=True, slots=True)
class TierCounts:
    """What the tier was asked for and what it did since the server started, from ``/metrics``."""

    puts: int
    put_bytes: int
    refused_puts: int
    skipped_puts: int
    spoiled: int
    failures: int
    timeouts: int
    is_up: bool

    @property
    def settled(self) -> int:
        """Chunks about which the tier has given its final word."""
        return self.puts + self.refused_puts + self.skipped_puts


class PrivateServer:
    """``with PrivateServer(options, ...) as server``: started, L1 allocated; stopped by its pid at the end.

    Args:
        options: of `lmcache server` besides ports, attach path, L1 and chunk size.

    Raises:
        ServerFailed: it did not start.
    """

    def __init__(self, options: Sequence[str], l1_gb: float, chunk_tokens: int) -> None:
        self.port, self.http_port = _free_ports()
        self._folder = tempfile.TemporaryDirectory(prefix="lmcache-bench-")
        self._log_path = os.path.join(self._folder.name, "log")
        self._words = [f"--port={self.port}", f"--http-port={self.http_port}", f"--l1-size-gb={l1_gb:g}"]
        self._words += [f"--chunk-size={chunk_tokens}", "--attach-path", os.path.join(self._folder.name, "attach")]
        self._words += options
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
            self._wait_l1()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the core; 0 while there is none."""
        return self._process.pid if self._process is not None else 0

    def start(self) -> None:
        """Start the process and wait for its first healthy answer."""
        command = [sys.executable, "-m", "lmcache.benchmark.tier_child", str(os.getpid()), self._folder.name]
        command += self._words
        with open(self._log_path, "wb") as log:
            # A ctrl-C in the terminal is ours to handle, so it gets a process group of its own.
            environment = _environment(self._folder.name)
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, process_group=0
            )
        deadline = time.monotonic() + START_S
        while not self._is_healthy():
            if self._process.poll() is not None:
                raise ServerFailed(f"the private server did not start: {self._last_word()}")
            if time.monotonic() >= deadline:
                raise ServerFailed(f"the private server was not healthy within {START_S:g} s: {self._last_word()}")
            time.sleep(PAUSE_S / 10)

    def stop(self) -> None:
        """End the process: politely, and after ``STOP_S`` in any case."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(KeyboardInterrupt):  # another ctrl-C only ends the politeness
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_S)
        process.kill()
        process.wait()

    def close(self) -> None:
        """Stop, and remove what it left."""
        try:
            self.stop()
        finally:
            self._folder.cleanup()

    # --- questions

    def tier(self) -> dict[str, Any]:
        """The tier as ``/status`` shows it.

        Raises:
            ServerFailed: the server does not answer.
        """
        (adapter,) = json.loads(self._ask("GET", api.PATH_STATUS))["storage_manager"]["l2_adapters"]
        return dict(adapter)

    def counts(self) -> TierCounts:
        """The tier's counters now; ServerFailed where the server does not answer."""
        found = {name: float(value) for name, value in _LINE.findall(self._ask("GET", api.PATH_METRICS).decode())}
        if "puts" not in found:
            raise ServerFailed("the private server's metrics tell nothing of its tier")
        return TierCounts(
            puts=int(found["puts"]),
            put_bytes=int(found["put_bytes"]),
            refused_puts=int(found["refused_puts"]),
            skipped_puts=int(found["skipped_puts"]),
            spoiled=int(found["spoiled"]),
            failures=int(found["failures"]),
            timeouts=int(found["timeouts"]),
            is_up=found["up"] == 1,
        )

    def metrics(self) -> dict[str, float]:
        """The core's counters and gauges by name without its prefix; ServerFailed where the server does not answer."""
        text = self._ask("GET", api.PATH_METRICS).decode()
        return {name: float(value) for name, value in _CORE_LINE.findall(text)}

    def wait_tier(self) -> dict[str, Any]:
        """Return once the tier is in use: how ``/status`` shows it.

        Raises:
            ServerFailed: it cannot be opened; why.
        """
        deadline = time.monotonic() + OPEN_S
        while not (shown := self.tier())["is_healthy"]:
            counts = self.counts()
            if counts.failures + counts.timeouts >= TRIES_MAX or time.monotonic() >= deadline:
                raise ServerFailed(f"the tier cannot be used: {shown['reason']}")
            time.sleep(PAUSE_S)
        return shown

    def forget_l1(self) -> None:
        """Drop everything from L1, so that the next lookup has to ask the tier.

        Raises:
            ServerFailed: something stays in use.
        """
        deadline = time.monotonic() + ANSWER_S
        while json.loads(self._ask("POST", api.PATH_CLEAR))["cleared"]["num_kept"]:
            if time.monotonic() >= deadline:
                raise ServerFailed(f"L1 could not be emptied within {ANSWER_S:g} s")
            time.sleep(PAUSE_S / 10)

    def _wait_l1(self) -> None:
        """Wait until all of L1 exists: allocation would disturb what is measured, and stores would not fit yet."""
        deadline = time.monotonic() + L1_S
        while True:
            manager = json.loads(self._ask("GET", api.PATH_STATUS))
            l1 = manager["storage_manager"]["l1_manager"]
            if l1["memory_ready_bytes"] >= l1["memory_total_bytes"]:
                return
            if manager["reason"] is not None or time.monotonic() >= deadline:
                raise ServerFailed(f"L1 was not allocated: {manager['reason'] or f'not within {L1_S:g} s'}")
            time.sleep(PAUSE_S)

    def _is_healthy(self) -> bool:
        with contextlib.suppress(ServerFailed):
            self._ask("GET", api.PATH_HEALTH)
            return True
        return False

    def _ask(self, method: str, path: str) -> bytes:
        connection = http.client.HTTPConnection(HOST, self.http_port, timeout=ANSWER_S)
        try:
            connection.request(method, path)
            reply = connection.getresponse()
            body = reply.read()
        except (OSError, http.client.HTTPException) as error:
            is_dead = self._process is None or self._process.poll() is not None
            reason = f"it ended: {self._last_word()}" if is_dead else str(error)
            raise ServerFailed(f"the private server does not answer: {reason}") from None
        finally:
            connection.close()
        if reply.status != http.client.OK:
            raise ServerFailed(f"the private server answered {path} with {reply.status}")
        return body

    def _last_word(self) -> str:
        """The last line of its log, which says why it ended."""
        with open(self._log_path, "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - LOG_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        last = lines[-1] if lines else "it said nothing"
        return _STAMP.sub("", last).removeprefix("lmcache server: ")


def _environment(folder: str) -> dict[str, str]:
    """Ours, but for tokens that a server would ask its clients for: this one has no client but us. What it keeps goes
    into ``folder``."""
    ours = {name: value for name, value in os.environ.items() if not _SERVER_TOKEN.fullmatch(name)}
    return {**ours, "XDG_STATE_HOME": folder}


def _free_ports() -> tuple[int, int]:
    """Two ports of loopback that nobody has now."""
    with socket.socket() as one, socket.socket() as two:
        for probe in (one, two):
            probe.bind((HOST, 0))
        return int(one.getsockname()[1]), int(two.getsockname()[1])
