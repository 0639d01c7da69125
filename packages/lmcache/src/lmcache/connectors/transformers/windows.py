"""Several caches behind one range of block ids, so that one copying worker serves whichever cache a job names.

An engine with paged memory registers it once; a transformers cache is made for a prompt and goes with it. Each cache
that is copied opens a *window*: its blocks get numbers of their own, and its tensors stay alive until the window is
closed, so that a copy that outlives its caller's patience never writes into memory that is somebody else's by then.
"""

from __future__ import annotations

import threading
from array import array
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache.transfer.plan import CopyEngine, Plan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.layout import Layout
    from lmcache.transfer.pool_map import PoolMap

WINDOW_BLOCKS = 1 << 32
"""Block ids of one window; what is below is the block's number inside it."""


class Windows(CopyEngine):
    """A copy engine whose memory comes and goes. Every job lies in exactly one window."""

    def __init__(self) -> None:
        # No CopyEngine.__init__: there is no memory of its own.
        self._lock = threading.Lock()
        self._open: dict[int, tuple[CopyEngine, object]] = {}
        self._last = 0

    def open(self, layout: Layout, owner: object) -> int:
        """Make the blocks of ``layout`` known; ``owner`` keeps their memory alive. Returns the id of block 0."""
        with self._lock:
            self._last += 1
            self._open[self._last] = (CopyEngine(layout), owner)
            return self._last * WINDOW_BLOCKS

    def close(self, first_block: int) -> None:
        """Forget a window; a copy that runs in it must have ended."""
        with self._lock:
            del self._open[first_block // WINDOW_BLOCKS]

    def store(self, pool: PoolMap, plan: Plan, threads: int) -> bytes:
        """As CopyEngine's."""
        engine, plan = self._resolve(plan)
        return engine.store(pool, plan, threads)

    def retrieve(self, pool: PoolMap, plan: Plan, checksums: Sequence[int], threads: int) -> list[int]:
        """As CopyEngine's."""
        engine, plan = self._resolve(plan)
        return engine.retrieve(pool, plan, checksums, threads)

    def _resolve(self, plan: Plan) -> tuple[CopyEngine, Plan]:
        window = plan.blocks[0] // WINDOW_BLOCKS
        with self._lock:
            engine, _ = self._open[window]
        first = window * WINDOW_BLOCKS
        blocks = array("q", (block - first for block in plan.blocks))
        return engine, replace(plan, blocks=blocks)
