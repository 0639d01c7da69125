"""Bytes of one file, whole or not at all, and what a look at a folder brings."""

from __future__ import annotations

import contextlib
import errno
import heapq
import mmap
import os
import time
from collections.abc import Iterator, Sequence

from lmcache.tiers import objects

PARTS_MAX = 1024  # in one call, Linux's IOV_MAX
FULL = (errno.ENOSPC, errno.EDQUOT)
REST_EVERY, REST_S = 64, 50e-6  # a thread that only computes lets others have Python's lock so often


Found = tuple[int, bytes, int, bytes]
"""An object seen by a look: when it was used last (ns), its key, bytes and tenant. No class: the garbage collector
leaves plain tuples of numbers and bytes alone, and there may be a million."""


def takes_direct(folder: int, path: str) -> bool:
    """Whether O_DIRECT works in a folder, found out by writing a page to a path that does not exist.

    Raises:
        OSError: that file cannot be removed.
    """
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_DIRECT
    try:
        fd = os.open(path, flags, 0o600, dir_fd=folder)
    except OSError as error:
        with contextlib.suppress(FileNotFoundError):  # some file systems make the file first
            os.unlink(path, dir_fd=folder)
        return error.errno in FULL
    try:
        with mmap.mmap(-1, objects.PAGE_BYTES) as page:
            os.pwrite(fd, page, 0)
    except OSError as error:
        return error.errno in FULL
    finally:
        os.close(fd)
        os.unlink(path, dir_fd=folder)
    return True


def write_all(fd: int, parts: Sequence[memoryview]) -> None:
    """Write parts one behind the other. Raises OSError."""
    offset = 0
    for batch in _batches(parts):
        while batch:
            count = os.pwritev(fd, batch, offset)
            offset += count
            batch = _rest(batch, count)


def read_all(fd: int, parts: Sequence[memoryview]) -> bool:
    """Fill parts one behind the other; False where the file is too short. Raises OSError."""
    offset = 0
    for batch in _batches(parts):
        while batch:
            count = os.preadv(fd, batch, offset)
            if not count:
                return False
            offset += count
            batch = _rest(batch, count)
    return True


def read_header(fd: int, buffer: memoryview) -> objects.Header | None:
    """The header at the start of a file; None where there is none."""
    try:
        count = os.preadv(fd, [buffer[: objects.PAGE_BYTES]], 0)
        size = int.from_bytes(buffer[12:16], "little")
        if objects.PAGE_BYTES < size <= len(buffer) and count == objects.PAGE_BYTES:
            count = os.preadv(fd, [buffer[:size]], 0)
        return objects.decode(buffer[:count])
    except (OSError, objects.NoObject):
        return None


def oldest_first(runs: Sequence[list[Found]]) -> list[bytes]:
    """Keys of sorted runs, merged. The runs are used up, bit by bit: freeing millions of items at once takes long."""
    newest = [(-run[-1][0], index) for index, run in enumerate(runs) if run]
    heapq.heapify(newest)
    merged = []
    while newest:
        index = newest[0][1]
        run = runs[index]
        merged.append(run.pop()[1])
        if run:
            heapq.heapreplace(newest, (-run[-1][0], index))
        else:
            heapq.heappop(newest)
        if len(merged) % REST_EVERY == 0:
            time.sleep(REST_S)
    merged.reverse()
    return merged


def _batches(parts: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    for at in range(0, len(parts), PARTS_MAX):
        yield list(parts[at : at + PARTS_MAX])


def _rest(batch: list[memoryview], done_bytes: int) -> list[memoryview]:
    """What is left of a batch; a call may do less than it was asked to."""
    for index, part in enumerate(batch):
        if done_bytes < len(part):
            return [part[done_bytes:], *batch[index + 1 :]]
        done_bytes -= len(part)
    return []
