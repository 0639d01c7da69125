"""Down: a chunk of L1 becomes an object in every tier that lacks it."""

from __future__ import annotations

import asyncio
import logging
import mmap
import struct
from collections.abc import Callable, Sequence

from lmcache.cascade.guard import Guarded, Late
from lmcache.cascade.line import CoreLine
from lmcache.errors import LMCacheError, TierError
from lmcache.keys import NAMESPACE_PREFIX_BYTES, TENANT_BYTES
from lmcache.tiers.base import Share
from lmcache.tiers.objects import Header, encode, padded
from lmcache.wire.messages import Done
from lmcache.wire.orders import Write, Written

log = logging.getLogger("lmcache.cascade")


def page_view(num_bytes: int) -> memoryview:
    """Page-aligned memory of our own, for a header."""
    return memoryview(mmap.mmap(-1, num_bytes))


def split_origin(origin: bytes) -> tuple[bytes, bytes, bytes]:
    """Tenant, namespace, layout."""
    middle = TENANT_BYTES + NAMESPACE_PREFIX_BYTES
    return origin[:TENANT_BYTES], origin[TENANT_BYTES:middle], origin[middle:]


class Writer:
    """Carries out the writes that the core orders; ``used_bytes`` of extents are pinned for them."""

    def __init__(self, tiers: Sequence[Guarded], changed: Callable[[], None]) -> None:
        """``changed`` is called when a write has ended."""
        self.used_bytes = 0
        self._tiers = tiers
        self._changed = changed

    async def write(self, line: CoreLine, order: Write) -> None:
        """One chunk into all tiers, then tell the core; never raises."""
        ranks = len(order.checksums) // 8
        extent_bytes = padded(order.extent_bytes)
        self.used_bytes += ranks * extent_bytes
        try:
            line.demand_whole()
            offsets = struct.unpack(f"<{ranks}Q", order.offsets)
            checksums = struct.unpack(f"<{ranks}Q", order.checksums)
            header = Header(order.key, *split_origin(order.origin), order.extent_bytes, checksums)
            data = encode(header)
            first = page_view(len(data))
            first[:] = data
            parts = [first, *(line.extent(offset, extent_bytes) for offset in offsets)]
            limit_bytes = None if order.limit_bytes < 0 else order.limit_bytes
            share = Share(header.tenant, limit_bytes)
            outcomes = await asyncio.gather(*(self._write_to(tier, header, parts, share) for tier in self._tiers))
            line.demand_whole()  # else the tiers may have zeros, which nobody will take for the chunk
            failed = any(outcome is None for outcome in outcomes) or not any(tier.is_up for tier in self._tiers)
            kept = any(outcome is True for outcome in outcomes) or not failed
            await line.ask(Written(0, lease=order.lease, kept=kept), Done)
        except LMCacheError as error:
            # The lease ends by its time, or with the line.
            log.debug("a write was not reported: %s", error)
        finally:
            self.used_bytes -= ranks * extent_bytes
            self._changed()

    async def _write_to(self, tier: Guarded, header: Header, parts: Sequence[memoryview], share: Share) -> bool | None:
        """True: the tier has it. False: it does not want it, or is left alone now. None: it failed."""
        if not tier.is_up:
            return False
        try:
            if (await tier.contains([header.key]))[0] == header.num_bytes:
                tier.counts.skipped_puts += 1
                return True
            return await tier.put(header.key, parts, share)
        except Late as late:
            # The tier still reads the extents: they stay pinned until it is through, or until their lease ends.
            await asyncio.wait([late.call])
            return None
        except TierError as error:
            log.debug("not written: %s", error)
            return None
