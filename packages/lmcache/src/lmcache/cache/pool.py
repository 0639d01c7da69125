"""L1 memory: one tmpfs file, whose pages the core makes exist from front to back. The core itself never maps it."""

from __future__ import annotations

import errno
import threading

from lmcache.cache.base import PAGE_BYTES
from lmcache.cache.home import Home
from lmcache.cache.records import Records
from lmcache.errors import PoolError
from lmcache.system import File

WRITER_LOCK_BASE = 1 << 62
"""Byte of the pool file, far behind any memory, that stands for writer slot 0."""

_WRITERS_PROBED_MAX = 65_536


class Pool:
    """The open pool file.

    ``grow`` may run in another thread than everything else; ``ready_bytes`` tells only of memory that exists.
    """

    def __init__(self, file: File, total_bytes: int, records: Records, home: Home, ready_bytes: int = 0) -> None:
        self.file = file
        self.total_bytes = total_bytes
        self.ready_bytes = ready_bytes
        self.growth_stopped: str | None = None
        self._records = records
        self._home = home
        self._growing = threading.Lock()
        self._next_writer = 0

    @property
    def is_complete(self) -> bool:
        """Whether growing again is pointless: all memory exists, or there was none left."""
        return self.ready_bytes >= self.total_bytes or self.growth_stopped is not None

    def grow(self, num_bytes: int, *, wait: bool = True) -> int:
        """Make up to ``num_bytes`` more exist (whole pages) and return how many came. Blocks, with the GIL released.

        A file system that is full ends the growth for good; the pool keeps what it has and says so in
        ``growth_stopped``. With ``wait`` False, 0 is returned while another thread is growing the pool.
        """
        if not self._growing.acquire(blocking=wait):
            return 0
        try:
            step = min(-(-num_bytes // PAGE_BYTES) * PAGE_BYTES, self.total_bytes - self.ready_bytes)
            if step <= 0 or self.growth_stopped is not None:
                return 0
            try:
                self.file.allocate(self.ready_bytes, step)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                    raise
                self.growth_stopped = f"no memory left in the file system after {self.ready_bytes} bytes"
                return 0
            self._records.write_ready(self.ready_bytes + step)
            self.ready_bytes += step
            return step
        finally:
            self._growing.release()

    def grant_descriptor(self) -> tuple[int, int]:
        """A descriptor of the pool for one process, and its writer slot. Send it, then close it here.

        It has an open file description of its own with a shared lock on the slot's byte. A mapping keeps the
        description alive, so the lock ends exactly when that process has unmapped the pool or died, whoever else died
        before.

        Raises:
            PoolError: no writer slot is free.
        """
        for _ in range(_WRITERS_PROBED_MAX):
            slot = self._next_writer
            self._next_writer += 1
            if not self.writer_alive(slot):
                break
        else:
            raise PoolError("the pool has too many writers")
        file = self.file.reopen()
        try:
            file.hold_byte(WRITER_LOCK_BASE + slot)
        except OSError:
            file.close()
            raise
        return file.detach(), slot

    def damage(self) -> str | None:
        """What somebody did to the file that makes the pool useless, None while it is whole. Costs one fstat."""
        size_bytes = self.file.info().size_bytes
        if size_bytes >= self.total_bytes:
            return None
        return f"L1's file was cut to {size_bytes} of {self.total_bytes} bytes: restart the server"

    def writer_alive(self, slot: int) -> bool:
        """Whether some process still holds the descriptor of this slot, or a mapping of it."""
        return self.file.byte_is_held(WRITER_LOCK_BASE + slot)

    def close(self, *, persist: bool) -> None:
        """Close both files, and remove them unless ``persist``. A growth under way in another thread is waited for."""
        with self._growing:
            self.growth_stopped = "closed"
            if not persist:
                self._home.remove()
            self.file.close()
            self._records.file.close()
