"""Objects as the cascade hands them to a tier, and a tier that is open for a while."""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from hashlib import sha256
from typing import Any

from lmcache.errors import TierError
from lmcache.tiers import make_tier, objects
from lmcache.tiers.base import Share, Tier

NOBODY = Share(bytes(16))
HANG_S = 60.0

Parts = list[memoryview]


def made(name: object, extent_bytes: int = 64 << 10, ranks: int = 2, tenant: bytes = bytes(16)) -> tuple[bytes, Parts]:
    """A key and its object: header and random extents, in page-aligned memory."""
    key = sha256(repr(name).encode()).digest()
    header = objects.encode(objects.Header(key, tenant, bytes(16), bytes(8), extent_bytes, tuple(range(ranks))))
    each = objects.padded(extent_bytes)
    memory = memoryview(mmap.mmap(-1, len(header) + ranks * each))
    memory[: len(header)] = header
    memory[len(header) :] = os.urandom(ranks * each)
    ends = [len(header) + rank * each for rank in range(ranks)]
    return key, [memory[: len(header)], *(memory[end : end + each] for end in ends)]


def size(parts: Parts) -> int:
    """Bytes of an object."""
    return sum(map(len, parts))


def blank(parts: Parts) -> Parts:
    """Room for an object of the same form."""
    memory = memoryview(mmap.mmap(-1, size(parts)))
    room: Parts = []
    start = 0
    for part in parts:
        room.append(memory[start : start + len(part)])
        start += len(part)
    return room


async def holds(tier: Tier, key: bytes, parts: Parts) -> bool:
    """Whether the tier gives exactly these bytes back; False where it gives none. Other bytes fail the test."""
    room = blank(parts)
    if not await tier.get(key, room):
        return False
    assert room == parts
    return True


@contextlib.asynccontextmanager
async def opened(options: Mapping[str, object]) -> AsyncIterator[Tier]:
    """A tier from its options."""
    tier = make_tier(options)
    try:
        await tier.open()
        yield tier
    finally:
        await tier.close()


def run(main: Coroutine[Any, Any, None]) -> None:
    """A test's body, which may not hang."""
    asyncio.run(asyncio.wait_for(main, HANG_S))


async def when_up(call: Callable[..., Awaitable[bool]], *args: object) -> None:
    """Call until it is answered True; errors while the store comes up again are fine."""
    while True:
        with contextlib.suppress(TierError):
            assert await call(*args)
            return
        await asyncio.sleep(0.05)
