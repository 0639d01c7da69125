"""Objects for tests of tiers, in memory like L1's: a tmpfs file, pages handed out with a guarded page between them."""

from __future__ import annotations

import mmap
import os
import random
import secrets
from dataclasses import dataclass

from lmcache.tiers import objects
from lmcache.tiers.objects import PAGE_BYTES, Header

GUARD = b"\xa5" * PAGE_BYTES
KIB, MIB = 1 << 10, 1 << 20


@dataclass(frozen=True)
class Made:
    """An object: its parts, and what must be in them for ever."""

    key: bytes
    tenant: bytes
    parts: list[memoryview]
    content: tuple[bytes, ...]

    @property
    def num_bytes(self) -> int:
        """Header included."""
        return sum(map(len, self.content))


class Pool:
    """A mapping of a tmpfs file. Pieces are never given back: make one a test."""

    def __init__(self, num_bytes: int = 192 * MIB) -> None:
        fd = os.memfd_create("pool")
        os.ftruncate(fd, num_bytes)
        self._memory = memoryview(mmap.mmap(fd, num_bytes))
        os.close(fd)
        self._guards: list[int] = []
        self._end = 0
        self._guard()

    def _guard(self) -> None:
        self._guards.append(self._end)
        self._memory[self._end : self._end + PAGE_BYTES] = GUARD
        self._end += PAGE_BYTES

    def room(self, *sizes: int) -> list[memoryview]:
        """Parts of these sizes, filled with something that no object is."""
        parts = []
        for size in sizes:
            part = self._memory[self._end : self._end + size]
            assert len(part) == size, "the pool is used up"
            part[:] = b"\x5a" * size
            parts.append(part)
            self._end += size
            self._guard()
        return parts

    def room_for(self, made: Made) -> list[memoryview]:
        """Parts for another copy of an object."""
        return self.room(*map(len, made.content))

    def made(self, ranks: int = 1, extent_bytes: int = 64 * KIB, key: bytes = b"", tenant: bytes = bytes(16)) -> Made:
        """A new object of random bytes."""
        key = key or secrets.token_bytes(32)
        content = (header(key, ranks, extent_bytes, tenant), *_extents(key, ranks, objects.padded(extent_bytes)))
        parts = self.room(*map(len, content))
        for part, piece in zip(parts, content, strict=True):
            part[:] = piece
        return Made(key, tenant, parts, content)

    def is_whole(self) -> bool:
        """Nobody wrote beside the parts."""
        return all(self._memory[at : at + PAGE_BYTES] == GUARD for at in self._guards)


def header(key: bytes, ranks: int, extent_bytes: int, tenant: bytes) -> bytes:
    """The pages before the extents."""
    checksums = tuple(secrets.randbits(64) for _ in range(ranks))
    return objects.encode(Header(key, tenant, bytes(16), bytes(8), extent_bytes, checksums))


def same(parts: list[memoryview], made: Made) -> bool:
    """Whether parts hold an object, to the byte."""
    return len(parts) == len(made.content) and all(a == b for a, b in zip(parts, made.content, strict=True))


def _extents(key: bytes, ranks: int, size: int) -> list[bytes]:
    source = random.Random(key + secrets.token_bytes(8))
    return [source.randbytes(size) for _ in range(ranks)]
