"""Background allocation: the pool's memory comes into being while the core already serves what is there."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

from lmcache.cache.pool import Pool

STEP_BYTES = 64 << 20
_NICE = 10


class Growth(threading.Thread):
    """Grows the pool step by step until it is whole. Its end, good or bad, is told to the core by ``wake``."""

    def __init__(self, pool: Pool, wake: Callable[[], None]) -> None:
        super().__init__(name="lmcache-growth", daemon=True)
        self._pool = pool
        self._wake = wake
        self._stopping = threading.Event()
        self.fault: str | None = None

    def run(self) -> None:
        """Called by ``start``."""
        try:
            # Of all that a start does this can wait longest; what an engine needs sooner, its Reserve allocates.
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            while not self._stopping.is_set() and not self._pool.is_complete:
                self._pool.grow(STEP_BYTES)
        except Exception as error:
            self.fault = f"{type(error).__name__}: {error}"
        finally:
            self._wake()

    def stop(self) -> None:
        """Ask it to end and wait for the step in hand."""
        self._stopping.set()
        if self.is_alive():
            self.join(timeout=1.0)
