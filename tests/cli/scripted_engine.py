"""An OpenAI-like engine that does what a script says, as a process of its own; standard library only.

A test says what each generation request meets (``Behaviour``: the n-th request the n-th one, later ones the last), asks
the engine through real sockets, and reads afterwards what arrived and when each event was written: seconds of
``time.perf_counter``, which on Linux is CLOCK_MONOTONIC and the same in every process. A token is a word.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

MODEL = "scripted"
START_S = 30.0
PROCESS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "scripted_process.py")


@dataclass(frozen=True)
class Behaviour:
    """What one generation request meets; the default is a good short answer.

    Attributes:
        texts: one event each; a mapping is a whole `delta` (or, for completions, is joined as text).
        repeat: how many times ``texts`` is gone through.
        first_s, gap_s: silence before the first text, and from each text to the next (kept to a fixed schedule).
        in_step: whether all answers write at the same moments, ``gap_s`` apart, as an engine does that batches.
        prefill_s_per_token: more silence before the first text for each prompt token that is not cached.
        head_s: silence before the response head.
        usage: whether usage is reported when it is asked for. ``prompt_tokens`` and ``output_tokens``: instead of what
            was counted. ``cached_tokens``: None leaves the key away; "prefix" pretends a prefix cache.
        finish_reason: in the last choice; None leaves it away.
        done: whether `[DONE]` is sent.
        together: events in one write.
        framing: `chunked`, `length` (of the whole, known before) or `close`.
        line_end: between the lines of the stream.
        status, reason, body, content_type: instead of a stream, where ``body`` is not None.
        raw: written instead of any HTTP answer, then the connection is closed.
        hang_after, die_after, error_after: after so many texts: silence for ever (-1: no head either), connection
            reset (-1: no head either), an error event and the end.
        comments_s: while it hangs, a comment this often.
        linger_s: silence after `[DONE]`, before the body ends.
    """

    texts: Sequence[str | Mapping[str, Any]] = ("Hel", "lo", " world")
    repeat: int = 1
    first_s: float = 0.0
    gap_s: float = 0.0
    in_step: bool = False
    prefill_s_per_token: float = 0.0
    head_s: float = 0.0
    usage: bool = True
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | str | None = None
    finish_reason: str | None = "length"
    done: bool = True
    together: int = 1
    framing: str = "chunked"
    line_end: str = "\n"
    status: int = 200
    reason: str = ""
    body: str | None = None
    content_type: str = "application/json"
    raw: str | None = None
    hang_after: int | None = None
    die_after: int | None = None
    error_after: int | None = None
    error: str = "the GPU fell off the bus"
    comments_s: float | None = None
    linger_s: float = 0.0


@dataclass(frozen=True)
class Script:
    """How the engine as a whole behaves: what ``/v1/models`` lists, whether there is ``/tokenize``, health."""

    behaviours: Sequence[Behaviour] = (Behaviour(),)
    models: Sequence[str] = (MODEL,)
    tokenize: bool = True
    is_healthy: bool = True
    version: str | None = "0.0.scripted"


@dataclass
class Asked:
    """One generation request as it arrived, and when what was written: ``text_s`` has one time for each text."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    connection: int
    arrived_s: float
    head_s: float | None = None
    text_s: list[float] = field(default_factory=list)
    done_s: float | None = None
    is_cut: bool = False  # the client went away in the middle


class ScriptedEngine:
    """The engine's process, seen from the test; a context manager.

    Attributes:
        url: `http://127.0.0.1:PORT` (`https` with a certificate).
        pid: of the process.
    """

    def __init__(
        self,
        *behaviours: Behaviour,
        script: Script | None = None,
        host: str = "127.0.0.1",
        port: int = 0,
        certificate: str | None = None,
    ) -> None:
        """``behaviours`` is short for a ``script`` with these; ``certificate`` is a PEM file with its key."""
        command = [sys.executable, PROCESS, host, str(port), certificate or ""]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.pid = self._process.pid
        line = self._process.stdout.readline()  # ends with the process, too
        if not line.startswith("ports "):
            self.close()
            raise RuntimeError(f"the scripted engine did not start: {line!r}")
        self.port, self._control_port = map(int, line.split()[1:])
        shown = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if certificate else 'http'}://{shown}:{self.port}"
        if script is not None or behaviours:
            self.play(*behaviours, script=script)

    def play(self, *behaviours: Behaviour, script: Script | None = None) -> None:
        """From now on behave like this; what was asked so far is forgotten."""
        script = script or Script()
        if behaviours:
            script = dataclasses.replace(script, behaviours=behaviours)
        self._control("script", dataclasses.asdict(script))

    def asked(self) -> list[Asked]:
        """Every generation request since the last ``play``, in order of arrival."""
        return [Asked(**item) for item in self._control("asked")["asked"]]

    @property
    def in_flight_max(self) -> int:
        """The most generation requests that were being answered at one time."""
        return int(self._control("asked")["in_flight_max"])

    def paths(self) -> list[str]:
        """`METHOD PATH` of every request of any kind since the last ``play``."""
        return list(self._control("asked")["paths"])

    def _control(self, what: str, document: Any = None) -> Any:
        data = json.dumps(document).encode()
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self._control_port}/{what}", data, timeout=START_S) as reply:
            return json.loads(reply.read())

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait(START_S)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def __enter__(self) -> ScriptedEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
