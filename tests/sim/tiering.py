"""The service process of a simulated world: the real cascade over real tiers, and somebody who uses the HTTP API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lmcache.cascade.run import Cascade
from lmcache.errors import LMCacheError, TierError
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share, Tier, Usage
from lmcache.wire import messages as m
from lmcache.wire.async_client import open_client

from . import memory
from .kernel import Kernel, Process, Violation
from .oracle import Oracle, Written
from .server import ATTACH_PATH, LOCAL
from .sockets import Unix

GB = 1 << 30


@dataclass
class TierFaults:
    """Probability of each, for one call of a tier."""

    fail: float = 0.0
    slow: float = 0.0
    hang: float = 0.0
    flip: float = 0.0  # a bit of what it reads


class Watched:
    """A tier between the cascade and the adapter: makes it worse, and checks what it promises.

    ``kept``: keys whose puts were answered True, with what is not held against the tier taken out again.
    """

    def __init__(self, kernel: Kernel, oracle: Oracle, tier: Tier, faults: TierFaults, kept: dict[bytes, int]) -> None:
        self.kind, self.backend, self.place = tier.kind, tier.backend, tier.place
        self.survives, self.concurrency = tier.survives, tier.concurrency
        self._kernel = kernel
        self._oracle = oracle
        self.tier = tier
        self._faults = faults
        self._busy: set[bytes] = set()
        self.kept = kept

    async def open(self) -> None:
        await self.tier.open()

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        await self._trouble()
        return await self.tier.contains(keys)

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        with _Alone(self._busy, key):
            await self._trouble()
            stored = await self.tier.put(key, parts, share)
            if stored:
                self.kept[key] = sum(map(len, parts))
            return stored

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        with _Alone(self._busy, key), self._filling(parts):
            await self._trouble()
            found = await self.tier.get(key, parts)
            if found and self._kernel.chance(self._faults.flip):
                part = self._kernel.random.choice(parts)
                part[self._kernel.random.randrange(len(part))] ^= 1 << self._kernel.random.randrange(8)
            return found

    @contextmanager
    def _filling(self, parts: Sequence[memoryview]) -> Iterator[None]:
        """The adapter may write to these parts until its call is over, whoever still waits for it."""
        files, writes, places = memory.PoolMap.files, [], []
        try:
            for part in parts:
                place = files.find(part)
                if place is not None:
                    who = object()
                    mapping, offset = place
                    self._oracle.begin_write(who, Written(mapping.inode, offset, offset + len(part)))
                    writes.append(who)
                    places.append(place)
            yield
            for mapping, offset in places:
                if not files.may_write(mapping, offset):
                    raise Violation(f"a tier writes to an extent at {offset} that is not reserved for the cascade")
        finally:
            for who in writes:
                self._oracle.end_write(who)

    async def delete(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self.kept.pop(key, None)
        await self.tier.delete(keys)

    async def usage(self) -> Usage:
        return await self.tier.usage()

    async def close(self) -> None:
        await self.tier.close()

    async def _trouble(self) -> None:
        kernel, faults = self._kernel, self._faults
        if kernel.chance(faults.hang):
            await asyncio.sleep(kernel.random.uniform(1.0, 45.0))
        elif kernel.chance(faults.slow):
            await asyncio.sleep(kernel.random.uniform(0.01, 1.5))
        elif kernel.chance(0.5):
            await asyncio.sleep(kernel.random.uniform(0.0001, 0.002))
        if kernel.chance(faults.fail):
            kernel.trace("a tier fails")
            raise TierError("it is not in the mood")


class _Alone:
    """The framework guarantees one call a key."""

    def __init__(self, busy: set[bytes], key: bytes) -> None:
        self._busy, self._key = busy, key

    def __enter__(self) -> None:
        if self._key in self._busy:
            raise Violation(f"two calls of a tier at a time for {self._key.hex()[:8]}")
        self._busy.add(self._key)

    def __exit__(self, *_: object) -> None:
        self._busy.discard(self._key)


class Service:
    """One life of the service process."""

    def __init__(
        self, kernel: Kernel, process: Process, token: bytes, line: Unix, tiers: Sequence[tuple[str, Tier]], policy: str
    ) -> None:
        self.process = process
        self.line = line
        self.tiers = tiers
        self._kernel = kernel
        self._token = token
        self.cascade: Cascade
        process.spawn(self._run(policy))

    async def _run(self, policy: str) -> None:
        self.cascade = Cascade(ATTACH_PATH, self._token, self.tiers, policy=policy, clock=self.process)
        await self.cascade.run()

    def is_busy(self) -> bool:
        """Whether the cascade carries out orders, or a tier is still at a call."""
        cascade = self.cascade
        promoter = cascade._promoter
        return bool(cascade._tasks or promoter._reading or promoter._running) or any(
            guarded._gate._free != max(1, guarded.tier.concurrency) for guarded in cascade._tiers
        )

    async def ask(self, request: m.Request) -> m.Reply | None:
        """One request of the HTTP API; None where the core does not answer."""
        try:
            client = await open_client(LOCAL)
        except LMCacheError:
            return None
        try:
            await client.call(m.Hello(0, version=m.WIRE_VERSION, token=self._token), 1.0)
            return await client.call(request, 1.0)
        except LMCacheError:
            return None
        finally:
            await client.close()


def make(kind: str, capacity_bytes: int, folder: str) -> Tier:
    """A real adapter."""
    options: dict[str, Any] = {"type": kind}
    if kind != "null":
        options["capacity_gb"] = max(0.001, capacity_bytes / GB)
    if kind == "file":
        options["base_path"] = folder
    return make_tier(options)
