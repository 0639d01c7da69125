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


@dataclass(frozen=True, slots=True)
class Plan:
    """Pairs of (blocks of one chunk, extent). ``blocks`` is row-major [num_chunks, blocks_per_chunk], int64."""

    blocks: array[int]
    offsets: array[int]  # uint64 [num_chunks], bytes into the pool
    seeds: array[int]  # uint64 [num_chunks]

    @classmethod
    def of(cls, blocks: Sequence[int], offsets: Sequence[int], seeds: Sequence[int]) -> Plan:
        """Build from plain integers."""
        return cls(array("q", blocks), array("Q", offsets), array("Q", seeds))


class CopyEngine:
    """Runs plans between one engine process's blocks and a pool. Thread-safe; each call releases the GIL."""

    def __init__(self, layout: Layout) -> None:
        self._table = layout.table()
        self._num_blocks = layout.num_blocks

    def store(self, pool: PoolMap, plan: Plan, threads: int) -> bytes:
        """Engine blocks -> extents; returns the checksum (uint64) of each extent."""
        return _native.store(pool.buffer, self._table, self._num_blocks, plan.blocks, plan.offsets, plan.seeds, threads)

    def retrieve(self, pool: PoolMap, plan: Plan, checksums: Sequence[int], threads: int) -> list[int]:
        """Extents -> engine blocks; returns the indices of the chunks whose bytes were not what was stored."""
        expected = array("Q", checksums)
        verified = _native.retrieve(
            pool.buffer, self._table, self._num_blocks, plan.blocks, plan.offsets, plan.seeds, expected, threads
        )
        return [index for index, good in enumerate(verified) if not good]
