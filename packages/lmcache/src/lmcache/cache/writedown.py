"""Which chunks are handed out to be written to the tiers, and what is said of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from lmcache.cache.base import Writing
from lmcache.cache.extents import Extents
from lmcache.cache.index import Index
from lmcache.cache.pool import Pool
from lmcache.cache.room import Room

WRITES_MAX = 256
WRITE_EXTENTS_MAX = 8192
"""Chunks, and extents of all their ranks, that are handed out at once: they must fit into one frame."""

WRITE_BACK_SHARE = 0.75
"""Part of L1 that is in use before a write-back begins."""

WRITE_BACK_WALK = 4096
"""Entries at the old end of L1 that are looked at for a write-back."""


class WriteDown:
    """Chooses among the entries that wait (``unwritten.py``)."""

    def __init__(self, room: Room, index: Index, extents: Extents, pool: Pool) -> None:
        self._room = room
        self._index = index
        self._extents = extents
        self._pool = pool

    def choose(
        self, bytes_max: int, limit_bytes: float, lease: Callable[[int], int | None], *, from_old_end: bool
    ) -> list[Writing]:
        """As many chunks as fit into ``bytes_max`` and one more; they wait no longer.

        Args:
            limit_bytes: what may be pinned altogether.
            lease: pins an entry and returns the lease's number, None where no more may be pinned.
            from_old_end: those that will be evicted next, and only while L1 is nearly full; else in their order.
        """
        unwritten = self._room.unwritten
        if not len(unwritten):
            return []
        chosen: list[Writing] = []
        num_extents = 0
        for entry in self._next_to_go() if from_old_end else list(islice(unwritten, WRITES_MAX)):
            if entry not in unwritten:
                continue
            if self._bytes(entry) > limit_bytes:  # will never be pinned, and must not bar the way for others
                unwritten.lose(entry)
                continue
            num_extents += self._index.world_size[entry]
            if bytes_max <= 0 or len(chosen) >= WRITES_MAX or (chosen and num_extents > WRITE_EXTENTS_MAX):
                break
            number = lease(entry)
            if number is None:
                break
            bytes_max -= self._bytes(entry)
            unwritten.take(entry)
            chosen.append(self._describe(number, entry))
        return chosen

    def _next_to_go(self) -> Iterable[int]:
        if self._extents.used_bytes < WRITE_BACK_SHARE * self._pool.total_bytes:
            return ()
        return list(islice(self._room.victims(), WRITE_BACK_WALK))

    def _bytes(self, entry: int) -> int:
        return self._extents.size_class(self._index.extent_bytes[entry]) * self._index.world_size[entry]

    def _describe(self, lease: int, entry: int) -> Writing:
        index = self._index
        offsets, checksums = index.details([entry])
        origin = self._room.origins.of(index.origin[index.first_slot(entry)])
        return Writing(lease, index.keys[entry], origin, index.extent_bytes[entry], offsets, checksums)
