"""Where a new chunk's memory comes from: a free extent, else more of the pool, else older chunks that nobody holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmcache.cache.base import PIECE_BYTES
from lmcache.cache.evict.base import Policy
from lmcache.cache.extents import NO_SLOT, Extents, Piece
from lmcache.cache.index import Index
from lmcache.cache.origins import Origins
from lmcache.cache.pool import Pool
from lmcache.cache.quotas import Quotas
from lmcache.cache.records import Records
from lmcache.cache.unwritten import Unwritten
from lmcache.keys import TENANT_BYTES

_WALK = 4096
"""Victims that are looked at before a piece is taken that is not entirely among them."""

_CANDIDATES = 16


class Room:
    """Hands out slots with an extent, evicting where it must."""

    def __init__(
        self, pool: Pool, extents: Extents, index: Index, quotas: Quotas, records: Records, origins: Origins
    ) -> None:
        self.extents = extents
        self.origins = origins
        self.unwritten = Unwritten()
        self.leased: dict[int, int] = {}  # entry -> leases that hold it; such entries are never evicted
        self.num_evicted = 0
        self._quotas = quotas
        self._pool = pool
        self._index = index
        self._policy: Policy = quotas
        self._records = records
        self._grow_budget = 0
        self._has_grown = False
        self._changes = 0
        self._hopeless: dict[int, int] = {}  # class -> count of changes when nothing could be evicted for it

    def begin(self, grow_bytes: int = PIECE_BYTES) -> None:
        """A request starts; it may wait for the allocation of this many bytes, or of what its first extent needs."""
        self._grow_budget = grow_bytes
        self._has_grown = False
        self.extents.set_ready(self._pool.ready_bytes)

    def take(self, size: int, num_wanted: int, origin: bytes) -> int | None:
        """A slot with an extent of class ``size``; None when all memory, or all that the tenant may have, is in use by
        leases and reservations.

        ``num_wanted``: extents that the request still wants, this one included, so that the pool grows once for all.
        """
        if not self._fits_limit(origin[:TENANT_BYTES], size):
            return None
        slot = self._take_slot()
        if slot is None:
            return None
        while (offset := self.extents.allocate(size, slot)) is None:
            if not self._grow(size, num_wanted) and not self._make_room(size):
                self._index.give_slot(slot)
                return None
        self._index.offset[slot] = offset
        self.own(slot, size, origin)
        return slot

    def own(self, slot: int, size: int, origin: bytes) -> None:
        """A slot with an extent of class ``size`` is a chunk's of that origin."""
        self._index.origin[slot] = self.origins.take(origin)
        self._quotas.add(origin[:TENANT_BYTES], size)

    def relabel(self, slots: Sequence[int], origin: bytes) -> bool:
        """Extents that were taken for nobody in particular are of this origin; False where its limit forbids it."""
        sizes = [self.extents.piece_at(self._index.offset[slot]).size for slot in slots]
        if not self._fits_limit(origin[:TENANT_BYTES], sum(sizes)):
            return False
        for slot, size in zip(slots, sizes, strict=True):
            self._disown(slot, size)
            self.own(slot, size, origin)
        return True

    def give_back(self, slot: int) -> None:
        """A slot, its record and its extent are free again."""
        offset = self._index.offset[slot]
        self._disown(slot, self.extents.piece_at(offset).size)
        self.extents.free(offset)
        self._records.clear(slot)
        self._index.give_slot(slot)
        self._changes += 1

    def evict(self, entry: int) -> None:
        """Forget a visible entry that nobody leases."""
        self._policy.remove(entry)
        self.unwritten.lose(entry)
        self._index.hide(entry)
        self.bury(entry)
        self.num_evicted += 1

    def bury(self, entry: int) -> None:
        """Give back what a hidden entry holds."""
        for slot in self._index.slots(entry):
            self.give_back(slot)
        self._index.drop(entry)

    def victims(self) -> Iterator[int]:
        """Visible entries in the order of going; nothing may be changed during the iteration."""
        return self._policy.victims()

    def changed(self) -> None:
        """Something became evictable."""
        self._changes += 1

    def _disown(self, slot: int, size: int) -> None:
        number = self._index.origin[slot]
        self._quotas.subtract(self.origins.tenant(number), size)
        self.origins.give(number)

    def _fits_limit(self, tenant: bytes, size: int) -> bool:
        """Make room among the tenant's own entries where its limit demands it; False where that is not enough."""
        while self._quotas.is_over(tenant, size):
            met: list[int] = []
            victim = None
            for entry in self._quotas.victims_of(tenant):
                if entry not in self.leased:
                    victim = entry
                    break
                met.append(entry)
            self._policy.touch(met)
            if victim is None:
                return False
            self.evict(victim)
        return True

    def _take_slot(self) -> int | None:
        for _ in range(2):
            slot = self._index.take_slot()
            if slot is not None:
                if self._records.back(slot):
                    return slot
                self._index.give_slot(slot)
            victim = self._oldest()
            if victim is None:
                return None
            self.evict(victim)
        return None

    def _oldest(self) -> int | None:
        met = []
        oldest = None
        for entry in self._policy.victims():
            if entry not in self.leased:
                oldest = entry
                break
            met.append(entry)
        self._policy.touch(met)
        return oldest

    def _grow(self, size: int, num_wanted: int) -> bool:
        """Let the pool grow, unless its background growth is at it this very moment (then older chunks must go)."""
        shortfall = self.extents.shortfall(size)
        if shortfall is None or self._pool.is_complete or (shortfall > self._grow_budget and self._has_grown):
            return False
        step = max(shortfall, min(self._grow_budget, num_wanted * size))
        self._has_grown = True
        grown = self._pool.grow(step, wait=False)
        self._grow_budget -= grown
        self.extents.set_ready(self._pool.ready_bytes)
        return grown > 0

    def _make_room(self, size: int) -> bool:
        """Evict the oldest entry of this class, or a whole piece of another class if all in it is older than that.

        Walking from the oldest entry on, the first piece that is met completely is the piece whose youngest entry is
        oldest. After ``_WALK`` entries the piece that misses least is taken, so that a large cache costs no long
        walk. Leased entries are in use, so they are touched when they are met at the old end: each is passed over
        once, not at every allocation.
        """
        if self._hopeless.get(size) == self._changes:
            return False
        victims: list[int] = []
        met_leased: list[int] = []
        seen: dict[Piece, int] = {}
        index, extents = self._index, self.extents
        for num_walked, entry in enumerate(self._policy.victims(), 1):
            if entry in self.leased:
                met_leased.append(entry)
                continue
            pieces = [extents.piece_at(index.offset[slot]) for slot in index.slots(entry)]
            if pieces[0].size == size:
                victims = [entry]
                break
            for piece in pieces:
                seen[piece] = seen.get(piece, 0) + 1
            whole = [piece for piece in pieces if seen[piece] == piece.used and self._can_serve(piece, size)]
            if not whole and num_walked % _WALK == 0:
                whole = self._nearly_met(seen, size)
            if whole:
                victims = self._entries_of(whole[0])
                break
        self._policy.touch(met_leased)
        for entry in victims:
            self.evict(entry)
        if not victims:
            self._hopeless[size] = self._changes
        return bool(victims)

    def _can_serve(self, piece: Piece, size: int) -> bool:
        """Whether a piece, once empty, can hold an extent of ``size`` (the one at the frontier: once grown)."""
        return piece.length >= size if not self._pool.is_complete else self.extents.capacity(piece, size) > 0

    def _nearly_met(self, seen: dict[Piece, int], size: int) -> list[Piece]:
        """The piece with the fewest entries beyond those seen, if one of the best candidates can be emptied at all."""
        candidates = sorted(seen, key=lambda piece: piece.used - seen[piece])[:_CANDIDATES]
        for piece in candidates:
            entries = self._entries_of(piece)
            evictable = all(entry and entry not in self.leased for entry in entries)
            if evictable and self._can_serve(piece, size):
                return [piece]
        return []

    def _entries_of(self, piece: Piece) -> list[int]:
        """Entries with an extent in a piece; 0 stands for extents that are no visible entry's."""
        return list(dict.fromkeys(self._index.entry[slot] for slot in piece.slots if slot != NO_SLOT))
