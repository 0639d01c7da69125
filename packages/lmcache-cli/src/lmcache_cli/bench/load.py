"""When requests are sent: so many in flight (closed loop), or at given times (open loop).

An open loop never waits for anybody: a request is sent at its time, however many are still in flight, and one whose
time has passed because nothing was ready, too much was in flight, or this process was late, is counted as unsent and
not made up for, since a burst of late requests would measure something that nobody asked for.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

from lmcache_cli.bench.arrivals import arrivals
from lmcache_cli.bench.base import CROWDED, LATE, NOT_READY, Observer, Outcome, Pacing, Request, Source

IN_FLIGHT_MAX = 4096
LATE_S_MAX = 0.1
"""A due time that has passed by more is given up."""

Send = Callable[[Request, "float | None"], Awaitable[Outcome]]
Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


async def drive(
    source: Source,
    pacing: Pacing,
    send: Send,
    observer: Observer,
    *,
    seed: int = 0,
    clock: Clock = time.perf_counter,
    sleep: Sleep = asyncio.sleep,
) -> Counter[str]:
    """Send what ``source`` gives, and wait for all of it. When cancelled, what is in flight is given up and reported,
    then the cancellation goes on.

    Args:
        send: sends one request, due at that time (None: now), and returns its outcome, also when it is cancelled.
        observer: is told of every request and every outcome.
        seed: of the arrivals.

    Returns:
        How many due times passed without a request, by the reason (of ``base.UNSENT_REASONS``).
    """
    driver = _Driver(source, send, observer, clock)
    end_s = None if pacing.duration_s is None else clock() + pacing.duration_s
    with _few_collections():
        try:
            if pacing.rate_per_s is None:
                await driver.closed(pacing.concurrency or 1, end_s)
            else:
                due = arrivals(pacing.arrival, pacing.rate_per_s, seed)
                await driver.open(due, end_s, sleep)
        finally:
            await driver.give_up()
    return driver.unsent


class _Driver:
    def __init__(self, source: Source, send: Send, observer: Observer, clock: Clock) -> None:
        self._source = source
        self._send = send
        self._observer = observer
        self._clock = clock
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self.unsent: Counter[str] = Counter()

    async def closed(self, concurrency: int, end_s: float | None) -> None:
        """Keep ``concurrency`` in flight until the source is at its end, or the time is."""
        while True:
            self._changed.clear()
            while len(self._tasks) < concurrency and (end_s is None or self._clock() < end_s):
                request = self._source.take()
                if request is None:
                    break
                self._launch(request, None)
            if not self._tasks:
                return
            await self._change()

    async def open(self, due: Iterator[float], end_s: float | None, sleep: Sleep) -> None:
        """Send one request at each due time, then wait for the last answers."""
        start_s = self._clock()
        for offset_s in due:
            due_s = start_s + offset_s
            if self._source.is_exhausted or (end_s is not None and due_s >= end_s):
                break
            wait_s = due_s - self._clock()
            if wait_s > 0:
                await sleep(wait_s)
            reason = self._hindrance(due_s)
            request = None if reason else self._source.take()
            if request is not None:
                self._launch(request, due_s)
            elif not self._source.is_exhausted:
                self.unsent[reason or NOT_READY] += 1
            if wait_s <= 0:
                await sleep(0)  # let what has just been sent go out before the next one
        while self._tasks:
            self._changed.clear()
            await self._change()

    def _hindrance(self, due_s: float) -> str:
        """Why nothing is sent at this due time, whatever the source has; "" if nothing speaks against it."""
        if self._clock() - due_s > LATE_S_MAX:
            return LATE
        return CROWDED if len(self._tasks) >= IN_FLIGHT_MAX else ""

    async def give_up(self) -> None:
        """Cancel what is in flight, and take its outcomes in."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    def _launch(self, request: Request, due_s: float | None) -> None:
        self._observer.sent(request)
        task = asyncio.ensure_future(self._carry(request, due_s))
        self._tasks.add(task)
        task.add_done_callback(self._over)

    async def _carry(self, request: Request, due_s: float | None) -> None:
        outcome = await self._send(request, due_s)
        self._source.done(outcome)
        self._observer.done(outcome)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._changed.set()
        if not task.cancelled():
            self._error = self._error or task.exception()

    async def _change(self) -> None:
        """Wait until a request has ended; raises what ``send`` should not have raised."""
        await self._changed.wait()
        if self._error is not None:
            raise self._error


@contextmanager
def _few_collections() -> Iterator[None]:
    """Texts and what was imported are left out of the garbage collector's rounds, whose pauses would be measured."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
