"""Keeps one service process alive, from the core's side, without ever waiting for it."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping

from lmcache.system import Clock, Entropy

_BACKOFF_S = (0.1, 0.5, 2.0, 5.0)
_STEADY_S = 30.0
_STOP_S = 0.9
_TOKEN_BYTES = 16

log = logging.getLogger("lmcache.core")


class Supervisor:
    """Starts the service process, notices its death by the end of the line to it, starts it again after a while."""

    def __init__(self, clock: Clock, entropy: Entropy, http_socket: socket.socket, boot: Mapping[str, object]) -> None:
        """``boot`` is what each process is told, besides a token of its own; it travels by the line only."""
        self._clock = clock
        self._entropy = entropy
        self.token = b""
        self._http_socket = http_socket
        self._boot = boot
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._started_at = 0.0
        self._num_quick_deaths = 0
        self.restart_at: float | None = None

    def start(self) -> None:
        """Start a service process."""
        ours, theirs = socket.socketpair()
        http_fd = self._http_socket.fileno()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "lmcache.server.service"],
                stdin=theirs.fileno(),
                pass_fds=(http_fd,),
                process_group=0,  # a ctrl-C in the terminal is the core's to handle
            )
        ours.setblocking(False)
        self._line = ours
        self._started_at = self._clock.now()
        self.restart_at = None
        self.token = self._entropy.token(_TOKEN_BYTES)
        boot = {**self._boot, "http_fd": http_fd, "token": self.token.hex()}
        with contextlib.suppress(OSError):
            ours.send(json.dumps(boot).encode() + b"\n", socket.MSG_NOSIGNAL)

    def fileno(self) -> int | None:
        """The descriptor whose readiness means that the process is gone; None while there is none."""
        return None if self._line is None else self._line.fileno()

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
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_S)
        self._end()
        self.restart_at = None

    def _end(self) -> int | None:
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is None:
            return None
        self._process.kill()
        status = self._process.wait()
        self._process = None
        return status
