"""Encryption at rest: a tier around another one, which is handed nothing but sealed objects.

A sealed object is as long as the plain one, and its header says in clear what an adapter reads: whose it is, how long,
and its namespace. Checksums of the plain bytes are encrypted with them, since they would tell equal content apart from
other content. What was sealed with a key that is not configured, or not sealed at all, is absent here: it is not used,
not removed, and replaced by the next put of its key. What is damaged or exchanged reaches the caller without a header,
so that it is removed as any spoiled object is.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.metadata
import logging
import mmap
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lmcache.errors import TierError
from lmcache.tiers import objects
from lmcache.tiers.base import Share, Tier, Usage
from lmcache.tiers.file_threads import Threads
from lmcache.tiers.sealed_keys import Key

if TYPE_CHECKING:
    from types import ModuleType

BUFFER_BYTES_MAX = 128 << 20
"""Memory for sealed objects on their way to the store: in use and kept for reuse together, of one tier."""

THREADS = 4
CLOSE_S = 5.0
VERSION_MIN = 50  # of the library: earlier ones hold Python's lock while they encrypt
UNREADABLE_MAX, UNREADABLE_S = 1 << 16, 300.0
"""How many keys are remembered, and for how long, whose objects this tier cannot open."""

FOREIGN, PLAIN = "sealed with a key that is not configured", "not sealed"

log = logging.getLogger("lmcache.tiers")


class SealedTier:
    """Any adapter, sealed. The first key seals, all of them open."""

    def __init__(self, tier: Tier, keys: Sequence[Key]) -> None:
        self.kind = tier.kind
        self.backend = f"{tier.backend} (AES-256-GCM)"
        self.place = tier.place
        self.survives = tier.survives
        self.concurrency = tier.concurrency
        self._tier = tier
        self._keys = {key.id: key for key in keys}
        self._first = keys[0]
        self._threads = Threads(THREADS, "tier-seal")
        self._buffers = Buffers(BUFFER_BYTES_MAX)
        self._unreadable: dict[bytes, tuple[float, str]] = {}  # oldest first: when it is to be looked at again, and why
        self._cipher: ModuleType | None = None

    async def open(self) -> None:
        """Load the library, then open the tier inside.

        Raises:
            TierError: the library cannot be used, or the tier inside not be opened.
        """
        if self._cipher is None:
            self._cipher = await self._threads.run(_load)
        await self._tier.open()

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """See ``Tier``. A sealed object is as long as the plain one."""
        sizes = await self._tier.contains(keys)
        if self._unreadable:
            self._expire()
            return [0 if key in self._unreadable else size for key, size in zip(keys, sizes, strict=True)]
        return sizes

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """See ``Tier``.

        Raises:
            TierError: also where the parts are no object of this key.
        """
        num_bytes = sum(map(len, parts))
        try:
            header = objects.decode(parts[0])
        except objects.NoObject as error:
            raise TierError(f"what was to be sealed is no object: {error}") from None
        if header.key != key or header.num_bytes != num_bytes or header.seal is not None:
            raise TierError("what was to be sealed is another object")
        assert self._cipher is not None
        if num_bytes > self._cipher.OBJECT_BYTES_MAX:
            return False
        buffer = await self._buffers.take(num_bytes)
        try:
            await self._threads.run(self._cipher.seal, self._first, header, parts[1:], buffer[:num_bytes])
            stored = await self._tier.put(key, _split(buffer, parts), share)
        finally:
            self._buffers.give(buffer)
        if stored:
            self._unreadable.pop(key, None)
        return stored

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """See ``Tier``. An object that is not as it was sealed comes back without a header, which makes it spoiled."""
        if not await self._tier.get(key, parts):
            return False
        first = parts[0]
        try:
            header = objects.decode(first)
        except objects.NoObject:
            return True
        seal = header.seal
        with_key = None if seal is None else self._keys.get(seal.key_id)
        if with_key is None:
            self._remember(key, PLAIN if seal is None else FOREIGN)
            return False
        plain = None
        fits = objects.header_bytes(len(header.checksums)) == len(first) and header.num_bytes == sum(map(len, parts))
        if fits and header.key == key:
            assert self._cipher is not None
            plain = await self._threads.run(self._cipher.unseal, with_key, header, parts[1:])
        if plain is None:
            log.warning("object %s is not as it was sealed: damaged, exchanged or forged", key.hex()[:16])
            first[:] = bytes(len(first))
        else:
            first[:] = objects.encode(plain)
        return True

    async def delete(self, keys: Sequence[bytes]) -> None:
        """See ``Tier``."""
        await self._tier.delete(keys)
        for key in keys:
            self._unreadable.pop(key, None)

    async def usage(self) -> Usage:
        """See ``Tier``; objects that were met lately and could not be opened are a problem."""
        usage = await self._tier.usage()
        self._expire()
        if not self._unreadable:
            return usage
        reasons = [reason for _, reason in self._unreadable.values()]
        counts = [f"{reasons.count(reason)} {reason}" for reason in (FOREIGN, PLAIN) if reason in reasons]
        sentence = f"objects that cannot be used: {', '.join(counts)}"
        return replace(usage, problem=f"{usage.problem}; {sentence}" if usage.problem else sentence)

    async def close(self) -> None:
        """See ``Tier``."""
        try:
            await self._tier.close()
        finally:
            await self._threads.close(CLOSE_S)

    def _remember(self, key: bytes, reason: str) -> None:
        self._unreadable.pop(key, None)
        while len(self._unreadable) >= UNREADABLE_MAX:
            del self._unreadable[next(iter(self._unreadable))]
        self._unreadable[key] = time.monotonic() + UNREADABLE_S, reason

    def _expire(self) -> None:
        """Forget what is to be looked at again: another server may have replaced it."""
        now = time.monotonic()
        while self._unreadable:
            oldest = next(iter(self._unreadable))
            if self._unreadable[oldest][0] > now:
                break
            del self._unreadable[oldest]


class Buffers:
    """Page-aligned memory that is used again: to map fresh pages for each object costs more than to encrypt it."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._free: list[memoryview] = []
        self._used_bytes = 0
        self._turn = asyncio.Lock()
        self._given = asyncio.Event()

    async def take(self, num_bytes: int) -> memoryview:
        """At least so many bytes, first come first served; more than all there are only if nobody else has any."""
        async with self._turn:
            while self._used_bytes and self._used_bytes + num_bytes > self._bytes_max:
                self._given.clear()
                await self._given.wait()
            for index, buffer in enumerate(self._free):
                if num_bytes <= len(buffer) <= 2 * num_bytes and self._fits(len(buffer)):
                    del self._free[index]
                    break
            else:
                while self._free and self._used_bytes + self.free_bytes + num_bytes > self._bytes_max:
                    del self._free[0]
                buffer = memoryview(mmap.mmap(-1, num_bytes))
            self._used_bytes += len(buffer)
            return buffer

    def give(self, buffer: memoryview) -> None:
        """Back, once nobody uses it any more."""
        self._used_bytes -= len(buffer)
        if self._used_bytes + self.free_bytes + len(buffer) <= self._bytes_max:
            self._free.append(buffer)
        self._given.set()

    @property
    def free_bytes(self) -> int:
        """Kept for reuse."""
        return sum(map(len, self._free))

    def _fits(self, num_bytes: int) -> bool:
        return not self._used_bytes or self._used_bytes + num_bytes <= self._bytes_max


def _split(buffer: memoryview, parts: Sequence[memoryview]) -> list[memoryview]:
    """The buffer in pieces as long as the parts."""
    pieces, start = [], 0
    for part in parts:
        pieces.append(buffer[start : start + len(part)])
        start += len(part)
    return pieces


def _load() -> ModuleType:
    try:
        version = importlib.metadata.version("cryptography")
        if int(version.partition(".")[0]) < VERSION_MIN:
            raise TierError(f"needs the package 'cryptography' {VERSION_MIN} or later, not {version}")
        return importlib.import_module("lmcache.tiers.sealed_cipher")
    except ImportError as error:
        raise TierError(f"the package 'cryptography' cannot be loaded: {error}") from None
