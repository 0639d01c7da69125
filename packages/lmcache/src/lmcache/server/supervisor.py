"""Keeps one service process alive, from the core's side, without ever waiting for it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lmcache.system import Clock, Entropy

_BACKOFF_S = (0.1, 0.5, 2.0, 5.0)
_STEADY_S = 30.0
_STOP_S = 0.9
_TOKEN_BYTES = 16

log = logging.getLogger("lmcache.core")


class Spawned(NamedTuple):
    """A service process that waits for its first line, and our end of that line."""

    process: subprocess.Popen[bytes]
    line: socket.socket

    def end(self) -> int:
        """Close the line and end the process; returns its status."""
        self.line.close()
        self.process.kill()
        return self.process.wait()


def spawn() -> Spawned:
    """Start a service process. It imports, which takes longest of all in a start, and then waits to be told more.

    It does not get the tokens of the environment (LMCACHE_..._TOKEN): who may read /proc of it should not find them.
    """
    ours, theirs = socket.socketpair()
    environment = {name: value for name, value in os.environ.items() if not _is_token(name)}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "lmcache.server.service"],
            stdin=theirs.fileno(),
            env=environment,
            process_group=0,  # a ctrl-C in the terminal is the core's to handle
        )
    return Spawned(process, ours)


def _is_token(name: str) -> bool:
    return name.startswith("LMCACHE_") and name.endswith("_TOKEN")


class Supervisor:
    """Keeps a service process, notices its death by the end of the line to it, starts another one after a while."""

    def __init__(
        self,
        clock: Clock,
        entropy: Entropy,
        http_socket: socket.socket,
        boot: Mapping[str, object],
        first: Spawned,
    ) -> None:
        """``boot`` is what each process is told, besides a token of its own; it travels by the line only.

        ``first`` is the process that ``start`` begins with. It is this object's from now on.
        """
        self._clock = clock
        self._entropy = entropy
        self.token = b""
        self._http_socket = http_socket
        self._boot = boot
        self._spawned: Spawned | None = first
        self._started_at = 0.0
        self._num_quick_deaths = 0
        self.restart_at: float | None = None

    def start(self) -> None:
        """Give a service process all that it needs to serve; the first one is there already."""
        if self._spawned is None:
            self._spawned = spawn()
        line = self._spawned.line
        line.setblocking(False)
        self._started_at = self._clock.now()
        self.restart_at = None
        self.token = self._entropy.token(_TOKEN_BYTES)
        boot = {**self._boot, "token": self.token.hex()}
        with contextlib.suppress(OSError):
            fds = [self._http_socket.fileno()]
            socket.send_fds(line, [json.dumps(boot).encode() + b"\n"], fds, socket.MSG_NOSIGNAL)

    def fileno(self) -> int | None:
        """The descriptor whose readiness means that the process is gone; None while there is none."""
        return None if self._spawned is None else self._spawned.line.fileno()

    def bury(self) -> None:
        """After the end of the line: reap the process and plan the next one."""
        status = self._end()
        is_quick = self._clock.now() - self._started_at < _STEADY_S
        self._num_quick_deaths = self._num_quick_deaths + 1 if is_quick else 0
        pause_s = _BACKOFF_S[min(self._num_quick_deaths, len(_BACKOFF_S) - 1)]
        self.restart_at = self._clock.now() + pause_s
        log.warning("the service process ended with status %s; the next one starts in %g s", status, pause_s)

    def stop(self) -> None:
        """End the process for good: politely first, within a second in any case."""
        if self._spawned is not None:
            self._spawned.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._spawned.process.wait(_STOP_S)
        self._end()
        self.restart_at = None

    def _end(self) -> int | None:
        spawned, self._spawned = self._spawned, None
        return None if spawned is None else spawned.end()
