"""Objects in this process's memory: a tier without a store, for tests and for measuring what the others cost."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lmcache.tiers.base import Share, Usage
from lmcache.tiers.catalog import Catalog
from lmcache.tiers.options import GB, Options

PIECE_BYTES = 1 << 20  # copied without a pause: about 0.1 ms


class MemoryTier:
    """The adapter of type ``memory``. Option: ``capacity_gb``."""

    kind = "MemoryL2Adapter"
    backend = "memory"
    place = None
    survives = False
    concurrency = 4

    def __init__(self, options: Options) -> None:
        self._catalog = Catalog(int(options.number("capacity_gb", None, 0.001, 1 << 20) * GB))
        self._objects: dict[bytes, memoryview] = {}

    async def open(self) -> None:
        """See ``Tier``."""

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """See ``Tier``."""
        return [self._catalog.size(key) for key in keys]

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """See ``Tier``. What is too much goes, the longest unused first."""
        num_bytes = sum(map(len, parts))
        victims = self._catalog.reserve(key, num_bytes, share)
        if victims is None:
            return False
        for victim in victims:
            del self._objects[victim.key]
        made = memoryview(bytearray(num_bytes))
        start = 0
        for part in parts:
            await _copy(part, made[start : start + len(part)])
            start += len(part)
        self._objects[key] = made
        self._catalog.settle(key, True)
        return True

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """See ``Tier``."""
        if self._catalog.size(key) != sum(map(len, parts)):
            return False
        self._catalog.touch(key)
        made = self._objects[key]
        start = 0
        for part in parts:
            await _copy(made[start : start + len(part)], part)
            start += len(part)
        return True

    async def delete(self, keys: Sequence[bytes]) -> None:
        """See ``Tier``."""
        for key in keys:
            self._catalog.remove(key)
            self._objects.pop(key, None)

    async def usage(self) -> Usage:
        """See ``Tier``."""
        return Usage(
            num_objects=len(self._catalog),
            used_bytes=self._catalog.num_bytes,
            capacity_bytes=self._catalog.capacity_bytes,
            num_evicted=self._catalog.num_evicted,
            tenant_bytes=self._catalog.tenant_bytes(),
        )

    async def close(self) -> None:
        """Forget everything."""
        self._catalog.clear()
        self._objects.clear()


async def _copy(source: memoryview, target: memoryview) -> None:
    for at in range(0, len(source), PIECE_BYTES):
        target[at : at + PIECE_BYTES] = source[at : at + PIECE_BYTES]
        await asyncio.sleep(0)
