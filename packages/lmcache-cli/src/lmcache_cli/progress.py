"""How far a benchmark is, on stderr: two lines that are redrawn on a terminal, a line now and then elsewhere.

With ``render`` the only door to rich. Nothing here is slow in the thread that measures: it counts, and another thread
draws, at most four times a second. Only ASCII is written, and nothing that is wider than the terminal.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from lmcache_cli.bench.base import Outcome, Request
from lmcache_cli.render import one_line

REDRAWS_PER_S = 4
LINE_PERIOD_S = 5.0
LINE_WIDTH = 100
BAR_CELLS = 20

Clock = Callable[[], float]


@dataclass
class Tally:
    """What has happened in one phase.

    Attributes:
        total: of requests or steps; None when it is not known.
    """

    phase: str
    total: int | None
    begin_s: float
    num_done: int = 0
    num_sent: int = 0
    num_failed: int = 0
    ttft_s: float = 0.0
    num_ttft: int = 0

    def headline(self, now_s: float, width: int, *, has_bar: bool = True) -> str:
        """Phase, bar, how many of how many, time and time left, in at most ``width`` columns."""
        elapsed_s = max(now_s - self.begin_s, 0.0)
        count = f"{self.num_done}/{self.total}" if self.total is not None else f"{self.num_done} done"
        clock = shown_time(elapsed_s)
        left_s = self.left_s(elapsed_s)
        if left_s is not None:
            clock += f", left {shown_time(left_s)}"
        for bar in (self._bar() if has_bar else "", ""):
            line = " ".join(filter(None, [f"{self.phase}:", bar, count, clock]))
            if len(line) <= width:
                return line
        return line[:width]

    def detail(self, width: int) -> str:
        """In flight, failures, mean TTFT; "" for a phase without requests."""
        if not self.num_sent:
            return ""
        in_flight = max(self.num_sent - self.num_done, 0)
        mean = f", TTFT {self.ttft_s / self.num_ttft * 1e3:.0f} ms mean" if self.num_ttft else ""
        return f"{in_flight} in flight, {self.num_failed} failed{mean}"[:width]

    def left_s(self, elapsed_s: float) -> float | None:
        """Estimate from the pace so far; None while there is none."""
        if self.total is None or not self.num_done or self.num_done >= self.total:
            return None
        return elapsed_s / self.num_done * (self.total - self.num_done)

    def _bar(self) -> str:
        if not self.total:
            return ""
        full = min(BAR_CELLS * self.num_done // self.total, BAR_CELLS)
        return f"[{'#' * full}{'-' * (BAR_CELLS - full)}]"


class Silent:
    """Says nothing, and counts: the observer of `-q`, and what the others build on; a context manager."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.tally: Tally | None = None

    def say(self, text: str) -> None:
        """A line for people, such as a line of the plan."""

    def begin(self, phase: str, num_requests: int | None) -> None:
        """As ``base.Observer``."""
        self.tally = Tally(phase, num_requests, self._clock())

    def advance(self, num_done: int) -> None:
        """As ``base.Observer``."""
        if self.tally is not None:
            self.tally.num_done = num_done

    def sent(self, request: Request) -> None:  # noqa: ARG002
        """As ``base.Observer``."""
        if self.tally is not None:
            self.tally.num_sent += 1

    def done(self, outcome: Outcome) -> None:
        """As ``base.Observer``."""
        tally = self.tally
        if tally is None:
            return
        tally.num_done += 1
        if outcome.failure is not None:
            tally.num_failed += 1
        elif outcome.ttft_s is not None:
            tally.ttft_s += outcome.ttft_s
            tally.num_ttft += 1

    def end(self) -> None:
        """Nothing more will happen, unless a phase begins again."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class Lines(Silent):
    """Whole lines, every few seconds and at the end of each phase: for files, pipes and simple terminals."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._said = ""

    def say(self, text: str) -> None:
        """Write it at once."""
        _write(text)

    def begin(self, phase: str, num_requests: int | None) -> None:
        """The phase before is over; its last line is written."""
        self._say_state()
        super().begin(phase, num_requests)
        if self._thread is None:
            self._over.clear()
            self._thread = threading.Thread(target=self._tick, name="lmcache-progress", daemon=True)
            self._thread.start()

    def end(self) -> None:
        """Write the last line."""
        if self._thread is not None:
            self._over.set()
            self._thread.join(LINE_PERIOD_S)
            self._thread = None
        self._say_state()
        self.tally = None

    def _tick(self) -> None:
        while not self._over.wait(LINE_PERIOD_S):
            self._say_state()

    def _say_state(self) -> None:
        tally = self.tally
        if tally is None:
            return
        parts = [tally.headline(self._clock(), LINE_WIDTH, has_bar=False), tally.detail(LINE_WIDTH)]
        line = "; ".join(filter(None, parts))
        if line != self._said:
            self._said = line
            _write(line)


class Live(Silent):
    """Two lines at the bottom of a terminal, redrawn in place by rich."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        super().__init__(clock)
        from rich.console import Console
        from rich.live import Live as RichLive

        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        self._live = RichLive(
            console=self._console,
            get_renderable=self._drawn,
            refresh_per_second=REDRAWS_PER_S,
            redirect_stdout=False,
            redirect_stderr=False,
            transient=False,
        )
        self._is_on = False

    def say(self, text: str) -> None:
        """Above the two lines."""
        self._console.print(_ascii(one_line(text)), soft_wrap=True)

    def begin(self, phase: str, num_requests: int | None) -> None:
        """The phase before is over and stays as it was last."""
        self.end()
        super().begin(phase, num_requests)
        self._live.start(refresh=True)
        self._is_on = True

    def end(self) -> None:
        """The last state stays on the screen."""
        if self._is_on:
            self._is_on = False
            self._live.stop()

    def _drawn(self) -> Any:
        from rich.text import Text

        tally = self.tally
        if tally is None:
            return Text("")
        width = max(self._console.width - 1, 10)
        lines = filter(None, [tally.headline(self._clock(), width), tally.detail(width)])
        return Text("\n".join(map(_ascii, lines)), no_wrap=True, overflow="crop")


def make(quiet: bool) -> Silent:
    """The display that fits stderr; one that says nothing where ``quiet``."""
    if quiet or sys.stderr is None:
        return Silent()
    if sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown"):
        return Live()
    return Lines()


def shown_time(seconds: float) -> str:
    """`0:07`, `1:02:03`."""
    whole = math.floor(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def terminal_width() -> int:
    """Columns of the terminal; 80 where there is none."""
    return shutil.get_terminal_size((80, 24)).columns


def _write(text: str) -> None:
    try:
        sys.stderr.write(_ascii(one_line(text)) + "\n")
        sys.stderr.flush()
    except OSError:  # a reader of stderr that went away is no reason to lose a measurement
        return


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode("ascii")
