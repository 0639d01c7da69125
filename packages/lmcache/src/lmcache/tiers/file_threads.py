"""Threads that make blocking calls for an event loop.

Lighter than ``run_in_executor``, which costs as much as writing a small object does: results that are ready together
wake the loop once. The threads are daemons, so a file system that never answers does not keep the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar, TypeVarTuple, Unpack

Args = TypeVarTuple("Args")
Result = TypeVar("Result")
Job = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[..., Any], tuple[Any, ...]]

LOOK_S = 0.01


class Threads:
    """So many threads, started at the first call. All calls come from one event loop."""

    def __init__(self, count: int, name: str) -> None:
        self._count, self._name = count, name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._ready: deque[tuple[asyncio.Future[Any], Any, BaseException | None]] = deque()
        self._is_woken = False
        self._num_started = 0
        self._num_open = 0

    def run(self, work: Callable[[Unpack[Args]], Result], *args: *Args) -> asyncio.Future[Result]:
        """Queue a call. Who cancels the future ends his own wait, never the call."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._num_open += 1
        self._jobs.put((loop, future, work, args))
        if self._num_started < min(self._count, self._num_open):
            self._num_started += 1
            threading.Thread(target=self._serve, name=f"{self._name}-{self._num_started}", daemon=True).start()
        return future

    async def close(self, wait_s: float) -> bool:
        """Let the threads end when they have nothing to do; False if some call was not over by then."""
        deadline = asyncio.get_running_loop().time() + wait_s
        while self._num_open and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(LOOK_S)
        for _ in range(self._num_started):
            self._jobs.put(None)
        return not self._num_open

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, future, work, args = job
            result, failure = None, None
            try:
                result = work(*args)
            except BaseException as error:
                failure = error
            self._ready.append((future, result, failure))
            del job, future, work, args, result, failure  # what a call was given is not held until the next one
            if not self._is_woken:
                self._is_woken = True
                with contextlib.suppress(RuntimeError):  # the loop was closed, so nobody waits
                    loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False  # first: what becomes ready from now on wakes the loop again
        while self._ready:
            future, result, failure = self._ready.popleft()
            self._num_open -= 1
            if future.cancelled():
                continue
            if failure is None:
                future.set_result(result)
            else:
                future.set_exception(failure)
