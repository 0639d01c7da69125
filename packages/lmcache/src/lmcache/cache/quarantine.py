"""Chunks that were taken out because their bytes were not what was stored: how many, and which the last ones were."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from lmcache.system import Clock

NAMED_MAX = 32
"""Chunks that are named; older ones are only counted."""

PREFIX_BYTES = 8
"""Of a key or a namespace: enough to find it again, and as much as logs show of a key."""


@dataclass(frozen=True, slots=True)
class Spoiled:
    """One such chunk.

    Attributes:
        key: its first bytes.
        namespace: its first bytes; None where it is not known.
        rank: whose bytes were wrong; None where that is not known.
        age_s: since it was found.
    """

    key: bytes
    namespace: bytes | None
    rank: int | None
    age_s: float


class Quarantine:
    """Counts all of them and names the last ``NAMED_MAX``."""

    def __init__(self, clock: Clock) -> None:
        self.count = 0
        self._clock = clock
        self._named: deque[tuple[bytes, bytes | None, int | None, float]] = deque(maxlen=NAMED_MAX)

    def note(self, key: bytes, namespace: bytes | None, rank: int | None) -> None:
        """One more."""
        self.count += 1
        shown = None if namespace is None else namespace[:PREFIX_BYTES]
        self._named.append((key[:PREFIX_BYTES], shown, rank, self._clock.now()))

    def latest(self) -> tuple[Spoiled, ...]:
        """The last ones, the newest first."""
        now = self._clock.now()
        return tuple(Spoiled(key, namespace, rank, now - at) for key, namespace, rank, at in reversed(self._named))
