"""What an engine with sliding windows needs beyond vLLM's own care: blocks that a running store reads are kept from
being given to another request, and loads do not pile up.

Needed for sliding windows only: vLLM returns a block to its pool as soon as it has left the window, while the request
goes on, and nobody is asked. A reference more, as for a block that two requests share, keeps it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import KVCacheBlock


class Turn:
    """Of an engine with windows, one request at a time is loaded and has not run since.

    What vLLM (0.32) reserves for requests that wait for a load counts their blocks in one group, and none that a window
    has. Several of them can then hold all blocks between them, and each wait for more for ever; one alone always fits.
    """

    def __init__(self, are_windowed: bool) -> None:
        self._matters = are_windowed
        self._holder: str | None = None

    def is_free(self, request_id: str) -> bool:
        """Whether this request may be loaded now."""
        return self._holder is None or self._holder == request_id

    def take(self, request_id: str) -> None:
        """Its blocks are allocated, and its load begins."""
        if self._matters:
            self._holder = request_id

    def leave(self, request_ids: Container[str]) -> None:
        """These run, or are over."""
        if self._holder is not None and self._holder in request_ids:
            self._holder = None


class Pins:
    """References that store jobs hold, for the scheduling thread."""

    def __init__(self) -> None:
        self._manager: KVCacheManager | None = None
        self._held: dict[int, list[KVCacheBlock]] = {}

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's manager of tables and blocks, once it exists."""
        self._manager = manager

    @property
    def are_bound(self) -> bool:
        """Whether tables and blocks can be had."""
        return self._manager is not None

    @property
    def are_held(self) -> bool:
        """Whether any block is pinned."""
        return bool(self._held)

    def tables(self, request_id: str) -> list[list[int]]:
        """The request's block ids as they are now, one table a group."""
        assert self._manager is not None
        return [list(table) for table in self._manager.get_block_ids(request_id)]

    def pin(self, job: int, block_ids: Sequence[int]) -> None:
        """Keep blocks that a request has now, until ``unpin``."""
        if block_ids:
            assert self._manager is not None
            pool = self._manager.block_pool
            blocks = [pool.blocks[block_id] for block_id in block_ids]
            pool.touch(blocks)
            self._held[job] = blocks

    def unpin(self, job: int) -> None:
        """Give a job's blocks back, the last of a prompt first, as vLLM does; nothing if it has none."""
        blocks = self._held.pop(job, None)
        if blocks:
            assert self._manager is not None
            self._manager.block_pool.free_blocks(reversed(blocks))
