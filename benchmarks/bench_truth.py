"""How late does `lmcache bench engine` notice what the engine writes? Both ends of every piece of text, on one clock.

    python benchmarks/bench_truth.py [--json PATH] [--seconds 3] [--rounds 2]

A scripted engine, a process of its own, notes CLOCK_MONOTONIC just before each write. The sender is the one that
`bench engine` uses: ``load.drive`` over ``stream.measure``, closed loop, prompts of 4,000 words, 47 pieces a second in
each stream; the display is the one that it shows, on a terminal that a third process reads. "In step": the engine
writes to all streams at the same moments, as one that batches does; else each stream keeps its own time. The
sender has its times of arrival from the kernel; "read" is what it has where the kernel does not say (another system),
the time of reading: a piece then also waits for those before it, and for a core. That is shown and not judged.
Every text is checked to be the one that was written, and no time of arrival may lie before its writing. Runs on Linux,
where ``time.perf_counter`` is the same in all processes.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import common
from common import Row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "cli"))

from scripted_engine import MODEL, Asked, Behaviour, ScriptedEngine

from lmcache_cli import progress
from lmcache_cli.bench.base import Listed, Outcome, Pacing, Request
from lmcache_cli.bench.load import drive
from lmcache_cli.bench.stamped import StampedSocket
from lmcache_cli.bench.stream import measure
from lmcache_cli.target import Target

PIECES_PER_S = 47
PIECES = 141  # of one answer: three seconds
PROMPT_WORDS = 4000
P50_MS_MAX, P99_MS_MAX = 1.0, 5.0


class Kept(progress.Silent):
    """Passes everything on to a display, and keeps the outcomes."""

    def __init__(self, display: progress.Silent) -> None:
        super().__init__()
        self.outcomes: list[Outcome] = []
        self._display = display

    def sent(self, request: Request) -> None:
        """As ``base.Observer``."""
        self._display.sent(request)

    def done(self, outcome: Outcome) -> None:
        """As ``base.Observer``."""
        self.outcomes.append(outcome)
        self._display.done(outcome)


@contextmanager
def terminal() -> Iterator[None]:
    """Standard error is a terminal meanwhile, and somebody reads it."""
    master, slave = os.openpty()
    reader = subprocess.Popen(["cat"], stdin=master, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    former, term = sys.stderr, os.environ.get("TERM")
    os.environ["TERM"] = "xterm-256color"
    try:
        with os.fdopen(slave, "w") as sys.stderr:
            yield
    finally:
        sys.stderr = former
        if term is None:
            del os.environ["TERM"]
        else:
            os.environ["TERM"] = term
        os.close(master)
        reader.kill()
        reader.wait(10)


@contextmanager
def without_stamps() -> Iterator[None]:
    """The kernel is not asked for times of arrival meanwhile."""
    with mock.patch.object(StampedSocket, "ask_for_stamps"):
        yield


def requests(number: int) -> list[Request]:
    """Each with its id as the prompt's first word."""
    source = random.Random(0)
    words = [f"word{index}" for index in range(1000)]

    def request(index: int) -> Request:
        text = " ".join([f"r{index}", *source.choices(words, k=PROMPT_WORDS)])
        return Request(f"r{index}", [{"role": "user", "content": text}], PIECES)

    return [request(index) for index in range(number)]


def send_all(engine: ScriptedEngine, num_streams: int, number: int, has_display: bool) -> list[Outcome]:
    """So many requests, so many at a time."""
    target = Target(engine.url, timeout_s=30)

    async def send(request: Request, due_s: float | None) -> Outcome:
        return await measure(target, request, model=MODEL, due_s=due_s)

    def run(display: progress.Silent) -> list[Outcome]:
        kept = Kept(display)
        display.begin("measuring", number)
        asyncio.run(drive(Listed(requests(number)), Pacing(concurrency=num_streams), send, kept))
        display.end()
        return kept.outcomes

    if not has_display:
        return run(progress.Silent())
    with terminal():
        display = progress.make(quiet=False)
        assert isinstance(display, progress.Live)
        return run(display)


def lateness_ms(outcomes: list[Outcome], asked: list[Asked]) -> list[float]:
    """From the engine's write to our arrival, of every piece of text.

    Raises:
        RuntimeError: a request failed, a text is not the one that was written, or one arrived before it was.
    """
    written = {item.body["messages"][0]["content"].split(" ", 1)[0]: item for item in asked}
    late = []
    for outcome in outcomes:
        times = written[outcome.request.id].text_s
        if outcome.failure is not None:
            raise RuntimeError(f"{outcome.request.id}: {outcome.failure.message}")
        if outcome.text != "".join(texts()) or len(outcome.text_s) != len(times):
            raise RuntimeError(f"{outcome.request.id}: {len(times)} texts were written, others arrived")
        late += [(arrived - wrote) * 1e3 for arrived, wrote in zip(outcome.text_s, times, strict=True)]
    if min(late) < 0:
        raise RuntimeError("a text arrived before it was written: the clocks differ")
    return late


def texts() -> list[str]:
    """Those of one answer, all different."""
    return [f" piece{index}" for index in range(PIECES)]


def percentile(ordered: list[float], percent: float) -> float:
    """Nearest rank."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


@dataclass(frozen=True)
class Case:
    """What is sent and shown."""

    num_streams: int
    in_step: bool
    has_display: bool
    is_stamped: bool = True

    @property
    def title(self) -> str:
        """For the rows."""
        streams = f"{self.num_streams} stream{'s' if self.num_streams > 1 else ''}{' in step' if self.in_step else ''}"
        return f"piece of text noticed, {streams}{', with display' if self.has_display else ''}"


CASES = (
    Case(1, False, False),
    Case(1, False, True),
    Case(64, False, False),
    Case(64, False, True),
    Case(64, True, False),
    Case(64, True, True),
)
READ = Case(64, True, False, is_stamped=False)
"""Shown beside its twin."""


def play(engine: ScriptedEngine, case: Case, seconds: float) -> dict[str, float]:
    """One run."""
    engine.play(Behaviour(texts=texts(), gap_s=1 / PIECES_PER_S, in_step=case.in_step))
    number = case.num_streams * max(1, round(seconds * PIECES_PER_S / PIECES))
    cpu_s = os.times()
    with nullcontext() if case.is_stamped else without_stamps():
        outcomes = send_all(engine, case.num_streams, number, case.has_display)
    spent_s = sum(os.times()[:2]) - sum(cpu_s[:2])
    late = sorted(lateness_ms(outcomes, engine.asked()))
    elapsed_s = max(o.end_s for o in outcomes) - min(o.sent_s for o in outcomes)
    return {
        "pieces": len(late),
        "pieces_per_s": len(late) / elapsed_s,
        "p50": percentile(late, 50),
        "p99": percentile(late, 99),
        "max": late[-1],
        "cpu_share": spent_s / elapsed_s,
    }


def main() -> int:
    """Exit 1 when a bound is missed in the median round."""
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run, in answers of 3 s")
    parser.add_argument("--rounds", type=int, default=2, help="all cases in turn, so often")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    report = common.Report()
    taken: dict[Case, list[dict[str, float]]] = {case: [] for case in (*CASES, READ)}
    with ScriptedEngine() as engine:
        for _ in range(args.rounds):
            for case, runs in taken.items():
                runs.append(play(engine, case, args.seconds))
    for case in CASES:
        runs = taken[case]
        rate, share = (max(run[key] for run in runs) for key in ("pieces_per_s", "cpu_share"))
        note = f"{rate:,.0f} pieces/s, {share:.0%} of a core, latest {max(run['max'] for run in runs):.1f} ms"
        for key, bound in (("p50", P50_MS_MAX), ("p99", P99_MS_MAX)):
            figures = {"ours": common.spread([run[key] for run in runs])}
            if case == replace(READ, is_stamped=True):
                figures["when read"] = common.spread([run[key] for run in taken[READ]])
            value = figures["ours"]["median"]
            report.add(Row(f"{case.title}, {key}", "ms", figures, value, "ours, ms", bound, note=note))
            note = ""
    return report.end(args.json, {case.title + ("" if case.is_stamped else ", read"): taken[case] for case in taken})


if __name__ == "__main__":
    sys.exit(main())
