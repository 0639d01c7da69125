"""How late does `lmcache bench engine` notice what the engine writes? Both ends of every piece of text, on one clock.

    python benchmarks/bench_truth.py [--json PATH] [--seconds 6] [--rounds 3]

A scripted engine, a process of its own, notes CLOCK_MONOTONIC just before each write. The sender is the one that
`bench engine` uses: ``load.drive`` over ``stream.measure``, closed loop, prompts of 4,000 words, 47 pieces a second in
each stream; the display is the one that it shows, on a terminal that a third process reads. "In step": the engine
writes to all streams at the same moments, as one that batches does; else each stream keeps its own time. The
sender has its times of arrival from the kernel; "read" is what it has where the kernel does not say (another system),
the time of reading: a piece then also waits for those before it, and for a core. That row is shown and not judged.
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
from pathlib import Path
from typing import Any
from unittest import mock

import common

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


def case(
    engine: ScriptedEngine, num_streams: int, in_step: bool, has_display: bool, is_stamped: bool, seconds: float
) -> dict[str, Any]:
    """One run; prints its line."""
    engine.play(Behaviour(texts=texts(), gap_s=1 / PIECES_PER_S, in_step=in_step))
    number = num_streams * max(1, round(seconds * PIECES_PER_S / PIECES))
    cpu_s = os.times()
    with nullcontext() if is_stamped else without_stamps():
        outcomes = send_all(engine, num_streams, number, has_display)
    spent_s = sum(os.times()[:2]) - sum(cpu_s[:2])
    late = sorted(lateness_ms(outcomes, engine.asked()))
    elapsed_s = max(o.end_s for o in outcomes) - min(o.sent_s for o in outcomes)
    row = {
        "streams": num_streams,
        "in_step": in_step,
        "display": has_display,
        "kernel_times": is_stamped,
        "pieces": len(late),
        "pieces_per_s": len(late) / elapsed_s,
        "p50_ms": percentile(late, 50),
        "p90_ms": percentile(late, 90),
        "p99_ms": percentile(late, 99),
        "max_ms": late[-1],
        "cpu_share": spent_s / elapsed_s,
    }
    print(
        f"{num_streams:>7}  {'in step' if in_step else 'each its own':>12}  {'rich' if has_display else 'none':>7}"
        f"  {'kernel' if is_stamped else 'read':>6}"
        f"  {row['pieces']:>7}  {row['pieces_per_s']:>8.0f}  {row['p50_ms']:>7.3f}  {row['p90_ms']:>7.3f}"
        f"  {row['p99_ms']:>7.3f}  {row['max_ms']:>7.2f}  {row['cpu_share']:>5.0%}",
        flush=True,
    )
    return row


def main() -> int:
    """Exit 1 when a bound is missed in the median round."""
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each run, in answers of 3 s")
    parser.add_argument("--rounds", type=int, default=3, help="all cases in turn, so often")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    facts = common.head()
    print(
        f"{'streams':>7}  {'writes':>12}  {'display':>7}  {'times':>6}  {'pieces':>7}  {'pieces/s':>8}"
        f"  {'p50 ms':>7}  {'p90 ms':>7}  {'p99 ms':>7}  {'max ms':>7}  {'CPU':>5}"
    )
    cases = [(1, False, False, True), (1, False, True, True)]
    cases += [(64, in_step, has_display, True) for in_step in (False, True) for has_display in (False, True)]
    cases.append((64, True, False, False))
    keys = ("streams", "in_step", "display", "kernel_times")
    rows = []
    with ScriptedEngine() as engine:
        for _ in range(args.rounds):
            rows += [case(engine, *each, args.seconds) for each in cases]
    common.write(args.json, {**facts, "rows": rows})
    reached = True
    for each in cases[:-1]:
        num_streams, in_step, has_display, _ = each
        same = [row for row in rows if tuple(row[key] for key in keys) == each]
        words = ["in step" if in_step else "each its own", f"display {'rich' if has_display else 'none'}"]
        name = ", ".join([f"{num_streams} streams", *words])
        for key, bound in (("p50_ms", P50_MS_MAX), ("p99_ms", P99_MS_MAX)):
            value = common.spread([row[key] for row in same])["median"]
            reached = common.judge(f"{name}, {key[:3]}", value, bound, "ms") and reached
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
