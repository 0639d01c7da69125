"""One run, from the settings to the result: what is asked before, the phases in their order, and ctrl-C at any time."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from types import FrameType
from typing import Any

from lmcache_cli.bench import budget, config, counters, estimate, lag, load, sizing, stream, versions
from lmcache_cli.bench.base import (
    INTERRUPTED,
    TIME_OVER,
    BenchError,
    Estimate,
    Observer,
    Outcome,
    Pacing,
    Plan,
    Request,
    Run,
    Source,
    Texts,
    Workload,
)
from lmcache_cli.bench.rundir import MEASURED, WARMUP
from lmcache_cli.client import CacheServer, Engine
from lmcache_cli.target import Target

PROBE_S_MAX = 10.0  # for what is asked beside the measured requests
SIZING_S_MAX = 60.0  # for one text

WARMUP_FAILURES_MAX = 3  # in a row

Record = Callable[[Outcome, str], None]
Send = Callable[[Request, "float | None"], Coroutine[Any, Any, Outcome]]


@dataclass(frozen=True)
class Job:
    """A run that is about to begin: settings complete, nothing sent.

    Attributes:
        engine, server: where, and with what; ``server`` None without `--lmcache-url`.
    """

    config: config.Config
    engine: Target
    server: Target | None
    workload: Workload
    pacing: Pacing
    plan: Plan

    @property
    def estimate(self) -> Estimate:
        """How long the measurement takes, as far as that is known before."""
        return estimate.before(self.pacing, self.plan)


def settle(settings: config.Config, engine: Target, server: Target | None) -> config.Config:
    """``settings`` with the model and, where they are needed, the tokens per GB, asked for if they were not given.

    Raises:
        ServerError: the engine or the server could not be asked.
        CommandError: the server does not know.
    """
    needs_tokens = config.needs_tokens_per_gb(settings.workload) and settings.tokens_per_gb_kvcache is None
    if settings.model is None:
        with Engine(replace(engine, timeout_s=min(engine.timeout_s, PROBE_S_MAX))) as asked:
            settings = replace(settings, model=asked.first_model())
    if needs_tokens and server is not None:
        with CacheServer(server) as asked_server:
            tokens = budget.tokens_per_gb(asked_server.status(), settings.model or "")
        settings = replace(settings, tokens_per_gb_kvcache=tokens)
    return settings


def planned(settings: config.Config, engine: Target, server: Target | None) -> Job:
    """What a run with these settings is going to send; costs nothing.

    Raises:
        UsageFault: the settings contradict each other.
    """
    volume_tokens = config.volume_tokens(settings)
    workload = settings.kind(settings.settings, settings.seed, volume_tokens)
    return Job(settings, engine, server, workload, config.pacing(settings, workload), workload.plan())


def execute(job: Job, observer: Observer, record: Record) -> Run:
    """Carry out a run.

    Args:
        record: gets every outcome and its phase (of ``rundir``) as it comes.

    Returns:
        What was measured; after ctrl-C, what was measured until then, with ``is_interrupted``.

    Raises:
        CommandError: it could not begin, or the warm-up failed.
    """
    started_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    run = Run(
        config=job.config.as_file(),
        model=job.config.model or "",
        plan=job.plan,
        started_at=started_at,
        sizing="none",
        pacing=job.pacing,
        estimate=job.estimate,
    )
    try:
        run.versions = versions.collect(job.engine, job.server)
        _prepare(job, run, observer)
        if job.server is not None:
            run.server_before = counters.read(job.server)
        run.is_interrupted = until_interrupted(lambda: _measure(job, run, observer, record))
        if job.server is not None:
            run.server_after = counters.read(job.server)
    except KeyboardInterrupt:
        run.is_interrupted = True
    if job.plan.num_requests is not None:
        num_left = job.plan.num_requests - len(run.outcomes) - sum(run.unsent.values())
        if num_left > 0:
            run.unsent = {**run.unsent, INTERRUPTED if run.is_interrupted else TIME_OVER: num_left}
    return run


def until_interrupted(work: Callable[[], Coroutine[Any, Any, None]]) -> bool:
    """Run ``work`` on an event loop of its own; whether ctrl-C ended it.

    The first ctrl-C cancels it, so that it can say what it has; a second one does not wait for that.
    """
    presses = 0

    async def watched() -> None:
        task = asyncio.ensure_future(work())
        loop = asyncio.get_running_loop()

        def press(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
            nonlocal presses
            presses += 1
            if presses > 1:
                raise KeyboardInterrupt
            loop.call_soon_threadsafe(task.cancel)

        with _on_interrupt(press):
            try:
                await task
            except asyncio.CancelledError:
                if not presses:
                    raise

    try:
        asyncio.run(watched())
    except KeyboardInterrupt:
        return True
    return presses > 0


@contextmanager
def deaf() -> Iterator[None]:
    """Ctrl-C has no effect meanwhile: for the writing of what was measured, which takes a moment."""
    with _on_interrupt(lambda number, frame: None):  # noqa: ARG005
        yield


@contextmanager
def _on_interrupt(press: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # only there can a signal be met
        return
    former = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _prepare(job: Job, run: Run, observer: Observer) -> None:
    """Make all texts."""
    with Engine(replace(job.engine, timeout_s=min(job.engine.timeout_s, SIZING_S_MAX))) as engine:
        observer.begin("preparing", None)
        texts = _CountedTexts(sizing.texts_for(engine, run.model, job.config.seed), observer)
        run.sizing = texts.method
        job.workload.prepare(texts)


class _CountedTexts:
    """Texts, and how many have been made."""

    def __init__(self, texts: Texts, observer: Observer) -> None:
        self._texts = texts
        self._observer = observer
        self._num_done = 0

    def words(self, num_tokens: int, *seed: object) -> str:
        """As ``base.Texts``."""
        text = self._texts.words(num_tokens, *seed)
        self._num_done += 1
        self._observer.advance(self._num_done)
        return text

    @property
    def method(self) -> str:
        """As ``base.Texts``."""
        return self._texts.method


async def _measure(job: Job, run: Run, observer: Observer, record: Record) -> None:
    """Warm-up, silence, and the measured requests."""
    settings = job.config
    extras = {"ignore_eos": True} if settings.ignore_eos else None

    async def send(request: Request, due_s: float | None) -> Outcome:
        return await stream.measure(
            job.engine, request, model=run.model, body_extras=extras, due_s=due_s, retries=settings.retries
        )

    if not settings.no_warmup:
        await _warm_up(job, send, _Collector(run.warmup, WARMUP, observer, record))
    source = job.workload.source()
    if settings.no_warmup:
        source = _FirstOfGroup(source)
    observer.begin("measuring", job.plan.num_requests)
    ticker = lag.Ticker()
    try:
        run.unsent = await load.drive(
            source, job.pacing, send, _Measured(job, run, observer, record), seed=settings.seed
        )
    finally:
        run.loop_lag = ticker.stop()


async def _warm_up(job: Job, send: Send, collector: _Collector) -> None:
    """One request after another.

    Raises:
        BenchError: so many failed in a row that the engine will not do better.
    """
    requests = job.workload.warmup()
    if not requests:
        return
    collector.begin("warm-up", len(requests))
    num_failed = 0
    for request in requests:
        collector.sent(request)
        sending = asyncio.ensure_future(send(request, None))
        try:
            await asyncio.wait([sending])
        finally:  # cancelled: the request says so in its outcome
            sending.cancel()
            outcome = await sending
            collector.done(outcome)
        num_failed = 0 if outcome.failure is None else num_failed + 1
        if outcome.failure is not None and num_failed == min(WARMUP_FAILURES_MAX, len(requests)):
            raise BenchError(f"the warm-up failed: {outcome.failure.message}")
    await asyncio.sleep(job.workload.pause_s)


class _Collector:
    """Keeps the outcomes of one phase, and passes on what it is told."""

    def __init__(self, outcomes: list[Outcome], phase: str, observer: Observer, record: Record) -> None:
        self._outcomes = outcomes
        self._phase = phase
        self._observer = observer
        self._record = record

    def say(self, text: str) -> None:
        """As ``base.Observer``."""
        self._observer.say(text)

    def begin(self, phase: str, num_requests: int | None) -> None:
        """As ``base.Observer``."""
        self._observer.begin(phase, num_requests)

    def advance(self, num_done: int) -> None:
        """As ``base.Observer``."""
        self._observer.advance(num_done)

    def sent(self, request: Request) -> None:
        """As ``base.Observer``."""
        self._observer.sent(request)

    def done(self, outcome: Outcome) -> None:
        """As ``base.Observer``."""
        self._outcomes.append(outcome)
        self._record(outcome, self._phase)
        self._observer.done(outcome)


class _Measured(_Collector):
    """The measured requests; says how long they will take once that is known."""

    def __init__(self, job: Job, run: Run, observer: Observer, record: Record) -> None:
        super().__init__(run.outcomes, MEASURED, observer, record)
        self._job = job
        self._run = run

    def done(self, outcome: Outcome) -> None:
        """As ``base.Observer``."""
        super().done(outcome)
        found = estimate.after(self._job.pacing, self._job.plan, self._run.outcomes)
        if found is not None and found.duration_s is not None:
            self._run.estimate = found
            # in another thread, since a terminal takes its time
            line = f"estimated time: {found.duration_s:.3g} s ({found.reason})"
            asyncio.get_running_loop().run_in_executor(None, self.say, line)


class _FirstOfGroup:
    """A source whose requests say truthfully which is the first of its group, where no warm-up has sent any."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._groups: set[str] = set()

    def take(self) -> Request | None:
        """As ``base.Source``."""
        request = self._source.take()
        if request is None or not request.group or request.group in self._groups:
            return request
        self._groups.add(request.group)
        return replace(request, is_first=True)

    def done(self, outcome: Outcome) -> None:
        """As ``base.Source``."""
        self._source.done(outcome)

    @property
    def is_exhausted(self) -> bool:
        """As ``base.Source``."""
        return self._source.is_exhausted
