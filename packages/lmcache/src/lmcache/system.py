"""The outside world as small objects that are handed in: time, randomness, memory-backed files.

The cache and the server never call ``time``, ``os.urandom`` or file functions by themselves; a deterministic simulation
drives the very same code with its own clock and its own files.
"""

from __future__ import annotations

import os
import time
from typing import Protocol


class Clock(Protocol):
    """Monotonic seconds; only differences mean anything."""

    def now(self) -> float: ...


class Entropy(Protocol):
    """Unpredictable bytes for ids that nobody may guess."""

    def token(self, num_bytes: int) -> bytes: ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class SystemEntropy:
    """The kernel's random generator."""

    def token(self, num_bytes: int) -> bytes:
        return os.urandom(num_bytes)
