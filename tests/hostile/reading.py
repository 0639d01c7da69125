"""A process that maps a pool, has it cut, and touches it: ``reading.py HOW`` prints ``noticed`` if it knows."""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
from array import array

from lmcache.transfer import _native
from lmcache.transfer.pool_map import PoolMap

SIZE, EXTENT = 64 << 20, 64 << 10


def main(how: str) -> None:
    """Do it."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, SIZE)
    spare = os.dup(fd)
    pool = PoolMap(fd, SIZE)
    if how == "faulthandler":
        faulthandler.enable()
    assert pool.is_whole
    os.ftruncate(spare, 1 << 20)
    assert not pool.is_whole
    blocks = mmap.mmap(-1, EXTENT)
    address = ctypes.addressof(ctypes.c_char.from_buffer(blocks))
    planes = array("Q", [address, EXTENT, 1, 0, 1, 0, 1, 0, EXTENT])
    rows = (planes, array("Q", [1, 1, 1]), array("q", [0]), array("Q", [32 << 20]), array("Q", [1]))
    try:
        if how == "checksum":
            _native.checksum(memoryview(pool.buffer)[32 << 20 : (32 << 20) + EXTENT], 1)
        elif how == "retrieve":
            _native.retrieve(pool.buffer, *rows, array("Q", [5]), 2)
        elif how == "store":
            _native.store(pool.buffer, *rows, 2)
        elif how == "populate":
            _native.populate(pool.buffer, 32 << 20, EXTENT)
        elif how == "elsewhere":
            touch_another_file()
        elif how == "sent":
            os.kill(os.getpid(), signal.SIGBUS)
        else:
            view = memoryview(pool.buffer)
            assert bytes(view[32 << 20 : (32 << 20) + EXTENT]) == bytes(EXTENT)
            view[33 << 20 : (33 << 20) + EXTENT] = bytes(EXTENT)
            if _native.lost(pool.buffer):
                print("noticed")
    except OSError:
        print("noticed")


def touch_another_file() -> None:
    """A mapping that nobody guards."""
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.ftruncate(fd, 8192)
    memory = mmap.mmap(fd, 8192)
    os.ftruncate(fd, 0)
    print(memory[0])


if __name__ == "__main__":
    main(sys.argv[1])
