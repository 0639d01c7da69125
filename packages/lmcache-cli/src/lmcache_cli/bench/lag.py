"""How late the benchmark itself runs: a ticker on its event loop that notes how long after its time it wakes.

A loop that is busy, or that the system does not let run, sends late, and reads late what has arrived. Timers of asyncio
have a grain of 1 ms, so on an idle machine a few tenths of a millisecond are nothing.
"""

from __future__ import annotations

import asyncio
from collections import Counter

from lmcache_cli.bench.base import Lag

PERIOD_S = 0.01
STEPS_PER_MS = 10  # lateness is counted in steps of 0.1 ms, so that a long run needs no more memory than a short one


class Ticker:
    """Ticks on the running event loop from its making until ``stop``."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._steps: Counter[int] = Counter()
        self._max_ms = 0.0
        self._arm()

    def stop(self) -> Lag | None:
        """What was seen; None where it ended before the first tick was due."""
        self._handle.cancel()
        if self._loop.time() > self._due_s:
            self._note()  # the loop has been busy since, and this tick could not come
        num = sum(self._steps.values())
        if not num:
            return None
        return Lag(num, self._percentile(0.5, num), self._percentile(0.99, num), self._max_ms)

    def _arm(self) -> None:
        self._due_s = self._loop.time() + PERIOD_S
        self._handle = self._loop.call_at(self._due_s, self._tick)

    def _tick(self) -> None:
        self._note()
        self._arm()

    def _note(self) -> None:
        late_ms = max(self._loop.time() - self._due_s, 0.0) * 1e3
        self._max_ms = max(self._max_ms, late_ms)
        self._steps[round(late_ms * STEPS_PER_MS)] += 1

    def _percentile(self, share: float, num: int) -> float:
        """Nearest rank."""
        num_passed = 0
        for step in sorted(self._steps):
            num_passed += self._steps[step]
            if num_passed >= share * num:
                return step / STEPS_PER_MS
        return self._max_ms
