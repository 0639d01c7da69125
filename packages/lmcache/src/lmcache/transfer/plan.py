"""What one copy does: which engine blocks, which extents, under which seeds."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache.layout import Layout
from lmcache.transfer import _native
from lmcache.transfer.pool_map import PoolMap

NOT_WRITTEN = -1
"""Block id of a retrieve whose bytes are checked but written nowhere."""


Mark = object | None
"""A point in the engine's work that a copy has to follow (``CopyEngine.mark``); None where memory is the host's."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Pairs of (blocks of one chunk, extent). ``blocks`` is row-major int64 [num_chunks, blocks of a chunk in all layer
    groups, group after group]."""

    chunk_tokens: int
    blocks: array[int]
    offsets: array[int]  # uint64 [num_chunks], bytes into the pool
    seeds: array[int]  # uint64 [num_chunks]
    after: Mark = None

    @classmethod
    def of(
        cls,
        chunk_tokens: int,
        blocks: Sequence[int],
        offsets: Sequence[int],
        seeds: Sequence[int],
        after: Mark = None,
    ) -> Plan:
        """Build from plain integers."""
        return cls(chunk_tokens, array("q", blocks), array("Q", offsets), array("Q", seeds), after)


class CopyEngine:
    """Runs plans between one engine process's blocks and a pool. Thread-safe; each call releases the GIL."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._planes = layout.plane_table()
        self._groups: dict[int, array[int]] = {}  # by tokens of a chunk

    def mark(self) -> Mark:
        """What a copy that is ordered now has to follow. To be called on the engine's own thread."""
        return None

    def prepare(self, pool: PoolMap, ready_bytes: int, chunk_tokens: int) -> bool:
        """Make one more piece of the pool quick to reach; True while there is more below ``ready_bytes``."""
        del chunk_tokens
        return pool.populate(ready_bytes)

    def store(self, pool: PoolMap, plan: Plan, threads: int) -> bytes:
        """Engine blocks -> extents; returns the checksum (uint64) of each extent."""
        return _native.store(
            pool.buffer, self._planes, self._groups_of(plan), plan.blocks, plan.offsets, plan.seeds, threads
        )

    def retrieve(self, pool: PoolMap, plan: Plan, checksums: Sequence[int], threads: int) -> list[int]:
        """Extents -> engine blocks; returns the indices of the chunks whose bytes were not what was stored."""
        expected = array("Q", checksums)
        verified = _native.retrieve(
            pool.buffer, self._planes, self._groups_of(plan), plan.blocks, plan.offsets, plan.seeds, expected, threads
        )
        return [index for index, good in enumerate(verified) if not good]

    def _groups_of(self, plan: Plan) -> array[int]:
        if plan.chunk_tokens not in self._groups:
            self._groups[plan.chunk_tokens] = self.layout.group_table(plan.chunk_tokens)
        return self._groups[plan.chunk_tokens]
