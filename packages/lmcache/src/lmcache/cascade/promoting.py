"""Up: chunks that L1 lacks are looked for in the tiers, read into L1 in parallel, verified, and made visible."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import struct
from array import array
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lmcache.cascade.gate import Budget
from lmcache.cascade.guard import Guarded, Late
from lmcache.cascade.line import CoreLine
from lmcache.cascade.writing import page_view
from lmcache.errors import LMCacheError, TierError, WireError
from lmcache.keys import KEY_BYTES, checksum_seed
from lmcache.tiers.objects import Header, NoObject, decode, header_bytes, padded, padded_extent_bytes
from lmcache.transfer import _native
from lmcache.wire.messages import FULL, GRANTED, KEYS_MAX, Abort, Committed, Done
from lmcache.wire.orders import Admit, Admitted, Promoted, Publish, Wanted

WINDOW_CHUNKS = 64
"""Keys of a prompt that the tiers are asked for at once; the next ones while those are being read."""

BATCH_CHUNKS = 16

log = logging.getLogger("lmcache.cascade")


@dataclass(frozen=True, slots=True)
class Place:
    """Where one chunk is. ``level``: 0 is the uppermost tier."""

    key: bytes
    level: int
    size: int


class Promoter:
    """Carries out the promotions that the core orders."""

    def __init__(self, tiers: Sequence[Guarded], bytes_max: int) -> None:
        self._tiers = tiers
        self._budget = Budget(bytes_max)
        self._reading: dict[bytes, asyncio.Task[bool]] = {}
        self._cancelled: set[int] = set()
        self._running: set[int] = set()
        self._verifiers = ThreadPoolExecutor(2, thread_name_prefix="lmcache-verify")

    def limit(self, bytes_max: int) -> None:
        """Bytes that may be read at once, from now on."""
        self._budget.bytes_max = bytes_max

    def cancel(self, promotions: Sequence[int]) -> None:
        """Nobody waits for these any more: no further read is begun for them."""
        self._cancelled.update(self._running.intersection(promotions))

    async def close(self) -> None:
        """Wait for reads that are under way, for a moment, and end the threads."""
        reads = list(self._reading.values())
        if reads:
            await asyncio.wait(reads, timeout=0.5)
        self._verifiers.shutdown(wait=False, cancel_futures=True)

    async def promote(self, line: CoreLine, wanted: Wanted) -> None:
        """As many leading chunks as the tiers have, then tell the core; never raises."""
        number = wanted.promotion
        self._running.add(number)
        reads: list[asyncio.Task[bool]] = []
        num_found = 0
        try:
            async with contextlib.aclosing(self._find(wanted)) as windows:
                async for window in windows:
                    num_found += len(window)
                    if not await self._begin(line, wanted, window, reads):
                        break
            outcomes = await asyncio.gather(*reads)
            await line.ask(Promoted(0, number, num_found, sum(outcomes)), Done)
        except LMCacheError as error:
            log.debug("a promotion was not finished: %s", error)
        finally:
            self._running.discard(number)
            self._cancelled.discard(number)

    async def places(self, keys: Sequence[bytes]) -> list[Place | None]:
        """For each key the uppermost tier that has it, whatever its size; tiers that fail have nothing."""
        found: list[Place | None] = [None] * len(keys)
        for level, tier in enumerate(self._tiers):
            missing = [position for position, place in enumerate(found) if place is None]
            if not missing:
                break
            if not tier.is_up:
                continue
            try:
                sizes = await tier.contains([keys[position] for position in missing])
            except TierError as error:
                log.debug("not asked: %s", error)
                continue
            for position, size in zip(missing, sizes, strict=True):
                if size > 0:
                    found[position] = Place(keys[position], level, size)
        return found

    async def _find(self, wanted: Wanted) -> AsyncGenerator[list[Place], None]:
        """Chunks of the prompt up to the first that no tier has, window by window, one window ahead of the reads."""
        keys = [wanted.keys[start : start + KEY_BYTES] for start in range(0, len(wanted.keys), KEY_BYTES)]
        ahead = asyncio.ensure_future(self.places(keys[:WINDOW_CHUNKS]))
        try:
            for start in range(0, len(keys), WINDOW_CHUNKS):
                places = await ahead
                following = keys[start + WINDOW_CHUNKS : start + 2 * WINDOW_CHUNKS]
                whole = [place for place in _leading(places) if padded_extent_bytes(place.size, wanted.world_size)]
                is_last = len(whole) < len(places) or not following
                if not is_last:
                    ahead = asyncio.ensure_future(self.places(following))
                yield whole
                if is_last:
                    return
        finally:
            ahead.cancel()

    async def _begin(
        self, line: CoreLine, wanted: Wanted, window: list[Place], reads: list[asyncio.Task[bool]]
    ) -> bool:
        """Begin to read a window; False when there is no use in going on."""
        step = max(1, min(BATCH_CHUNKS, KEYS_MAX // wanted.world_size))
        for start in range(0, len(window), step):
            batch = window[start : start + step]
            if wanted.promotion in self._cancelled or not await self._start(line, wanted.world_size, batch, reads):
                return False
        return True

    async def _start(self, line: CoreLine, ranks: int, batch: list[Place], reads: list[asyncio.Task[bool]]) -> bool:
        """Get extents for a batch and begin to read it; False when L1 has no room for all of it."""
        start = 0
        while start < len(batch):
            if (known := self._reading.get(batch[start].key)) is not None:
                reads.append(known)
                start += 1
                continue
            size = batch[start].size
            stop = start
            while stop < len(batch) and batch[stop].size == size and batch[stop].key not in self._reading:
                stop += 1
            same = batch[start:stop]
            start = stop
            await self._budget.take(size * len(same))
            num_read = 0
            try:
                granted = await line.ask(_admission(same, ranks), Admitted)
                states, tickets, offsets = granted.states, array("Q", granted.tickets), array("Q", granted.offsets)
                if len(states) != len(same) or len(tickets) != len(same) or len(offsets) != len(same) * ranks:
                    raise WireError("the core's answer does not fit its question")
                for position, place in enumerate(same):
                    if states[position] == GRANTED:
                        extents = offsets[position * ranks : (position + 1) * ranks].tolist()
                        task = asyncio.create_task(self._read(line, place, tickets[position], extents))
                        self._reading[place.key] = task
                        task.add_done_callback(functools.partial(self._forget, place.key))
                        reads.append(task)
                        num_read += 1
            finally:
                await self._budget.give(size * (len(same) - num_read))
            if FULL in states:
                return False
        return True

    async def _read(self, line: CoreLine, place: Place, ticket: int, offsets: list[int]) -> bool:
        """One chunk into its extents; True once it is visible. The ticket is resolved in any case."""
        tier = self._tiers[place.level]
        ranks = len(offsets)
        try:
            line.demand_whole()
            extent_bytes = (place.size - header_bytes(ranks)) // ranks
            first = page_view(header_bytes(ranks))
            extents = [line.extent(offset, extent_bytes) for offset in offsets]
            header = await self._get(line, tier, place.key, first, extents)
            if header is not None:
                checksums = struct.pack(f"<{ranks}Q", *header.checksums)
                origin = header.tenant + header.namespace + header.layout
                request = Publish(0, ticket, origin, header.extent_bytes, checksums, place.level > 0)
                return (await line.ask(request, Committed)).num_chunks == 1
            await line.ask(Abort(0, ticket=ticket), Done)
        except Late as late:
            # The tier may still write to the extents; the core keeps them aside for as long as it takes.
            await asyncio.wait([late.call])
            await self._abort(line, ticket)
        except TierError as error:
            log.debug("not read: %s", error)
            await self._abort(line, ticket)
        except LMCacheError as error:
            log.debug("a read was not reported: %s", error)
        finally:
            await self._budget.give(place.size)
        return False

    def _forget(self, key: bytes, _: object) -> None:
        self._reading.pop(key, None)

    async def _abort(self, line: CoreLine, ticket: int) -> None:
        try:
            await line.ask(Abort(0, ticket=ticket), Done)
        except LMCacheError as error:
            log.debug("a reservation was not given back: %s", error)

    async def _get(
        self, line: CoreLine, tier: Guarded, key: bytes, first: memoryview, extents: list[memoryview]
    ) -> Header | None:
        """The header of an object whose bytes are what was stored; None where there is none. A spoiled one is deleted.

        Raises:
            TierError: the tier failed.
            PoolError: L1's memory is gone.
        """
        if not await tier.get(key, [first, *extents]):
            return None
        header: Header | None = None
        fault: _Fault | None
        try:
            header = decode(first)
        except NoObject as error:
            fault = _Fault(str(error))
        else:
            loop = asyncio.get_running_loop()
            try:
                fault = await loop.run_in_executor(self._verifiers, _verdict, header, key, extents)
            except OSError:  # memory that is gone; which is said below
                fault = _Fault("it was not read")
            line.demand_whole()
        if fault is None:
            return header
        tier.counts.spoiled += 1
        tier.quarantine.note(key, None if header is None else header.namespace, fault.rank)
        log.warning("tier %s: object %s is spoiled and is removed: %s", tier.name, key.hex()[:16], fault.reason)
        await tier.delete(key)
        return None


@dataclass(frozen=True, slots=True)
class _Fault:
    """Why an object is not what was stored; ``rank`` whose bytes are wrong, where it is one's."""

    reason: str
    rank: int | None = None


def _leading(places: Sequence[Place | None]) -> list[Place]:
    leading = []
    for place in places:
        if place is None:
            break
        leading.append(place)
    return leading


def _admission(places: Sequence[Place], ranks: int) -> Admit:
    extent_bytes = padded_extent_bytes(places[0].size, ranks)
    assert extent_bytes is not None
    return Admit(0, b"".join(place.key for place in places), ranks, extent_bytes)


def _verdict(header: Header, key: bytes, extents: Sequence[memoryview]) -> _Fault | None:
    """Why the bytes are not those that were stored under this key; None where they are. Runs on a thread."""
    if header.key != key:
        return _Fault("it is another chunk's")
    if len(header.checksums) != len(extents) or padded(header.extent_bytes) != len(extents[0]):
        return _Fault("it has another shape")
    for rank, (extent, expected) in enumerate(zip(extents, header.checksums, strict=True)):
        if _native.checksum(extent[: header.extent_bytes], checksum_seed(key, rank)) != expected:
            return _Fault(f"the bytes of rank {rank} do not have their checksum", rank)
    return None
