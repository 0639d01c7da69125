"""The server's pool as this process sees it: one shared mapping, entered into the page table ahead of its use."""

from __future__ import annotations

import mmap
import os
import weakref

from lmcache.errors import AttachError
from lmcache.transfer import _native

POPULATE_STEP_BYTES = 64 << 20


class PoolMap:
    """A mapping of the pool's file. Takes ownership of ``fd`` and closes it: the mapping outlives the descriptor.

    A copy that runs keeps the mapping alive by its buffer, so ``close`` while one runs only forgets it.
    """

    def __init__(self, fd: int, size_bytes: int) -> None:
        try:
            if os.fstat(fd).st_size < size_bytes:
                raise AttachError(f"the pool's file is smaller than the {size_bytes} bytes that the server told")
            self.buffer = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise AttachError(f"cannot map the pool: {error.strerror}") from None
        finally:
            os.close(fd)
        # The file can be cut under us; a page that is gone must cost the copy, not the process.
        self._guard = weakref.finalize(self.buffer, _native.unguard, _native.guard(self.buffer))
        self._guard.atexit = False
        self.size_bytes = size_bytes
        self.populated_bytes = 0

    @property
    def is_whole(self) -> bool:
        """Whether the file still has all the bytes that were mapped, and nothing was touched that it lacked."""
        return self.buffer.size() >= self.size_bytes and not _native.lost(self.buffer)

    def populate(self, ready_bytes: int) -> bool:
        """Enter up to one step of the memory that exists into the page table; True when more is left below
        ``ready_bytes``.

        Only memory that the server has already allocated is touched: a page that did not exist would be charged to us.
        """
        start = self.populated_bytes
        length = min(POPULATE_STEP_BYTES, ready_bytes - start)
        if length > 0:
            _native.populate(self.buffer, start, length)
            self.populated_bytes += length
        return self.populated_bytes < ready_bytes
