"""Time, processes and the choice of what happens next: everything that could differ between two runs comes from a seed.

A *process* has an event loop of its own, so that it can be stopped or killed between any two steps while the others go
on. Code that blocks runs on a *strand*: an operating system thread that only ever runs while everybody else waits for
it, so that it is as deterministic as the rest.
"""

# ruff: noqa: ARG002, ARG004 - signatures are those of what is stood in for
from __future__ import annotations

import asyncio
import heapq
import sys
import threading
from collections.abc import Callable, Coroutine
from hashlib import blake2b
from itertools import count
from random import Random
from typing import Any

TRACE_LINES = 400
STEPS_NOW_MAX = 5_000
TICK_S = 1e-9
"""By so much the clock goes beyond what was waited for: sums of floats may fall short of it."""


class Dead(BaseException):
    """This process was killed; nothing that it still does may be seen by anybody."""


class Violation(AssertionError):
    """An invariant does not hold. The world ends by it, even where the code under test swallows the exception."""

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        Kernel.current.violation = Kernel.current.violation or self


class Stuck(Violation):
    """Nothing will ever happen again although something is waited for, or too much at one moment."""


class Kernel:
    """The clock, the random choices, the events that are due some day, and all processes."""

    current: Kernel

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.now = 100.0
        self.steps = 0
        self.violation: Violation | None = None
        self.process: Process | None = None  # whose code runs now
        self.processes: list[Process] = []
        self.serials = count(1)
        self.lines: list[str] = []
        self._steps_now = 0
        self._timeline: list[tuple[float, int, str, Callable[[], None]]] = []
        self._numbers = count()
        self._digest = blake2b(digest_size=16)
        Kernel.current = self

    # --- trace

    def trace(self, what: str) -> None:
        """One line of what happened."""
        line = f"{self.steps} {self.now:.6f} {what}"
        self._digest.update(line.encode())
        if not what.startswith("turn of"):
            self.lines.append(line)
        if len(self.lines) > 2 * TRACE_LINES:
            del self.lines[:TRACE_LINES]

    def digest(self) -> str:
        """A hash of all lines so far."""
        return self._digest.hexdigest()

    # --- what happens

    def after(self, delay_s: float, what: str, action: Callable[[], None]) -> None:
        """Let something happen later."""
        self.at(self.now + delay_s, what, action)

    def at(self, when: float, what: str, action: Callable[[], None]) -> None:
        """Let something happen at a time; of two at the same time the one that was asked for first goes first."""
        heapq.heappush(self._timeline, (when, next(self._numbers), what, action))

    def chance(self, probability: float) -> bool:
        """Whether something of this probability happens."""
        return self.random.random() < probability

    def step(self) -> None:
        """Let one thing happen: an event that is due, or a turn of a process; time passes until there is one.

        Raises:
            Stuck: nothing is left to wait for.
        """
        self.steps += 1
        self._steps_now += 1
        if self._steps_now > STEPS_NOW_MAX:
            raise Stuck(f"{STEPS_NOW_MAX} steps and no time passes")
        while True:
            runnable = [process for process in self.processes if process.is_runnable()]
            is_due = bool(self._timeline) and self._timeline[0][0] <= self.now
            choices = len(runnable) + is_due
            if choices:
                break
            self._wait()
        choice = self.random.randrange(choices) if choices > 1 else 0
        if choice < len(runnable):
            process = runnable[choice]
            self.trace(f"turn of {process.name}")
            process.turn()
        else:
            _, _, what, action = heapq.heappop(self._timeline)
            self.trace(what)
            action()
        if self.violation is not None:
            raise self.violation

    def _wait(self) -> None:
        times = [self._timeline[0][0]] if self._timeline else []
        times += [when for process in self.processes if (when := process.wakes_at()) is not None]
        if not times:
            raise Stuck("nothing is left to happen")
        self.now, self._steps_now = max(self.now, min(times)) + TICK_S, 0


class Process:
    """One process with an event loop. ``skew_s``: how far its clock is ahead of the world's."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.is_alive = True
        self.stopped_until: float | None = None
        self.stopped_s = 0.0  # altogether
        self.skew_s = 0.0
        self.has_news = True  # something arrived, for a process that has no event loop
        self.said_at = 0.0  # when the last of what it has sent by a stream arrives
        self.at_exit: list[Callable[[], None]] = []
        self.loop = Loop(self)
        kernel.processes.append(self)

    def now(self) -> float:
        """Seconds of this process's monotonic clock."""
        return self.kernel.now + self.skew_s

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run something in this process; an error of it is the world's."""
        task = self.loop.create_task(work)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[Any]) -> None:
        if self.is_alive and not task.cancelled() and (error := task.exception()) is not None:
            self.loop.failure = error

    def is_runnable(self) -> bool:
        """Whether it has something to do and may run."""
        if self.stopped_until is not None and self.is_stopped():
            return False
        return self._has_work()

    def is_stopped(self) -> bool:
        """Whether a SIGSTOP holds it."""
        if self.stopped_until is not None and self.kernel.now >= self.stopped_until:
            self.stopped_until = None
        return self.stopped_until is not None

    def wakes_at(self) -> float | None:
        """When it may have something to do, in the world's time."""
        if not self.is_alive:
            return None
        when = self._next_timer()
        return when if self.stopped_until is None else self.stopped_until

    def stop(self, seconds: float) -> None:
        """SIGSTOP now, SIGCONT later."""
        self.stopped_until = self.kernel.now + seconds
        self.stopped_s += seconds

    def _has_work(self) -> bool:
        return self.loop.has_work(self.kernel.now + self.skew_s)

    def _next_timer(self) -> float | None:
        when = self.loop.next_timer()
        return None if when is None else when - self.skew_s

    def turn(self) -> None:
        """Do what is to do now."""
        self.enter()
        try:
            self.loop.turn()
        finally:
            self.leave()
        if self.loop.failure is not None:
            failure, self.loop.failure = self.loop.failure, None
            raise failure

    def enter(self) -> None:
        """The code that runs from now on is this process's."""
        self.kernel.process = self

    def leave(self) -> None:
        """It is nobody's."""
        self.kernel.process = None

    def kill(self) -> None:
        """SIGKILL. What its code does while it is unwound has no effect on anybody."""
        if not self.is_alive:
            return
        self.is_alive = False
        self.kernel.processes.remove(self)
        for action in self.at_exit:
            action()
        former, self.kernel.process = self.kernel.process, self
        try:
            self.loop.unwind()
        finally:
            self.kernel.process = former


def check_alive() -> Process:
    """The process whose code runs.

    Raises:
        Dead: it has been killed.
    """
    process = Kernel.current.process
    assert process is not None, "code of a process runs outside of it"
    if not process.is_alive:
        raise Dead
    return process


# --- event loops ------------------------------------------------------------------------------------------------------


class _Task(asyncio.Task):  # type: ignore[type-arg]
    """Hashes the same in every run, so that sets of tasks have one order."""

    serial: int

    def __new__(cls, *args: object, **kwargs: object) -> _Task:
        self = super().__new__(cls)
        self.serial = next(Kernel.current.serials)
        return self

    def __hash__(self) -> int:
        return self.serial


class _Future(asyncio.Future):  # type: ignore[type-arg]
    serial: int

    def __new__(cls, *args: object, **kwargs: object) -> _Future:
        self = super().__new__(cls)
        self.serial = next(Kernel.current.serials)
        return self

    def __hash__(self) -> int:
        return self.serial


class _NoSelector:
    def select(self, timeout: float | None) -> list[object]:
        del timeout
        return []


class Loop(asyncio.BaseEventLoop):
    """The event loop of one process, which the kernel turns."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        self._selector = _NoSelector()
        self._tasks_made: list[asyncio.Task[Any]] = []
        self.failure: BaseException | None = None
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        """This process's clock."""
        return self._process.now()

    def create_future(self) -> asyncio.Future[Any]:
        """A future with a constant hash."""
        return _Future(loop=self)

    def _make_task(self, loop: object, work: Any, **more: Any) -> asyncio.Task[Any]:
        task = _Task(work, loop=self, **more)
        self._tasks_made.append(task)
        if len(self._tasks_made) > 256:
            self._tasks_made = [made for made in self._tasks_made if not made.done()]
        return task

    def _complain(self, loop: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self._process.is_alive:
            self.failure = error or Violation(str(context.get("message")))

    def _process_events(self, events: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def run_in_executor(self, executor: Any, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """On a strand; what only computes, inline after a while."""
        from .strands import on_strand

        return self.create_task(on_strand(work, *args))

    def has_work(self, now: float) -> bool:
        """Whether something is ready, or a timer is due."""
        if self._ready:  # type: ignore[attr-defined]
            return True
        scheduled = self._scheduled  # type: ignore[attr-defined]
        if not scheduled or scheduled[0]._when > now:
            return False
        when = self.next_timer()
        return when is not None and when <= now

    def next_timer(self) -> float | None:
        """The first timer that was not cancelled; nothing is ready."""
        scheduled = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False
        return scheduled[0]._when if scheduled else None

    def turn(self) -> None:
        """Run what is ready now."""
        hooks = sys.get_asyncgen_hooks()
        self._thread_id = threading.get_ident()
        asyncio._set_running_loop(self)
        sys.set_asyncgen_hooks(firstiter=self._asyncgen_firstiter_hook, finalizer=self._asyncgen_finalizer_hook)
        try:
            self._run_once()  # type: ignore[attr-defined]
            for _ in range(3):
                if self._ready:  # type: ignore[attr-defined]
                    self._run_once()  # type: ignore[attr-defined]
        finally:
            sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(None)
            self._thread_id = None

    def unwind(self) -> None:
        """End all tasks of a process that is dead already."""
        for _ in range(100):
            tasks = [task for task in self._tasks_made if not task.done()]
            if not tasks:
                break
            for task in tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                task.cancel()
            for _ in range(3):
                if self._ready:  # type: ignore[attr-defined]
                    self.turn()
        for task in self._tasks_made:
            if task.done() and not task.cancelled():
                task.exception()
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self._closed = True
