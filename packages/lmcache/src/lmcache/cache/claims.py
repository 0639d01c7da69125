"""Reservations: extents that a writer is at, and the chunks that are to become visible once all ranks have written."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.cache.base import NO_WRITER, Owner
from lmcache.cache.index import Index
from lmcache.cache.records import Records
from lmcache.cache.room import Room

Shape = tuple[int, int]
"""World size, and bytes of one extent as the engine asked."""


class Pending:
    """A chunk that not all ranks have committed. ``slots``: by rank; ``written``: ranks that committed."""

    __slots__ = ("doomed", "expires", "key", "promoted", "shape", "slots", "written")

    def __init__(self, key: bytes, shape: Shape, expires: float, promoted: bool) -> None:
        self.key = key
        self.shape = shape
        self.expires = expires
        self.promoted = promoted  # comes from a tier, so that no tier needs it
        self.doomed = False  # will never become visible: extents go back as their writers are done
        self.slots: dict[int, int] = {}
        self.written: set[int] = set()


@dataclass(slots=True)
class Claim:
    """One granted reservation: of one rank by a worker, of all ranks of one chunk by the cascade."""

    owner: Owner
    expires: float
    promoted: bool = False
    parts: list[tuple[Pending, int, int]] = field(default_factory=list)  # chunk, rank and slot, in order of request


@dataclass(slots=True)
class Aside:
    """Slots whose reservation is over while their writer may still be writing."""

    owner: Owner | None  # None: of a server before this one
    writer: int
    slots: list[int]


class Claims:
    """All reservations (oldest first), pending chunks (oldest first) and set-aside extents."""

    def __init__(self, room: Room, index: Index, records: Records) -> None:
        self.by_ticket: dict[int, Claim] = {}
        self.of_owner: dict[Owner, set[int]] = {}
        self.pending: dict[bytes, Pending] = {}
        self.aside: dict[int, Aside] = {}  # by expired ticket; below 0 for those of a server before this one
        self.writers: dict[Owner, int] = {}
        self._room = room
        self._index = index
        self._records = records

    def claim(self, claim: Claim, key: bytes, rank: int, shape: Shape, slot: int) -> None:
        """Add a slot to a reservation that is being made."""
        pending = self.pending.get(key)
        if pending is None:
            pending = self.pending[key] = Pending(key, shape, claim.expires, claim.promoted)
        pending.slots[rank] = slot
        claim.parts.append((pending, rank, slot))
        by = (claim.owner & ((1 << 64) - 1), self.writers.get(claim.owner, NO_WRITER))
        origin = self._room.origins.of(self._index.origin[slot])
        self._records.reserve(slot, key, rank, shape, self._index.offset[slot], by, origin)

    def add(self, ticket: int, claim: Claim) -> None:
        """Issue a reservation."""
        self.by_ticket[ticket] = claim
        self.of_owner.setdefault(claim.owner, set()).add(ticket)

    def take(self, ticket: int) -> Claim:
        """A reservation is resolved, one way or the other."""
        claim = self.by_ticket.pop(ticket)
        owned = self.of_owner[claim.owner]
        owned.discard(ticket)
        if not owned:
            del self.of_owner[claim.owner]
        return claim

    def commit(self, claim: Claim, checksums: list[int]) -> list[Pending]:
        """Publish what a reservation wrote; returns the chunks that all ranks have written now, last chunk first.

        Last chunk first also in the records, whose sequence is the order of eviction after an adoption. The caller
        makes chunks visible after the records are written.
        """
        complete = []
        for (pending, rank, slot), checksum in zip(reversed(claim.parts), reversed(checksums), strict=True):
            if pending.doomed:
                self._room.give_back(slot)
                continue
            offset = self._index.offset[slot]
            origin = self._room.origins.of(self._index.origin[slot])
            self._index.checksum[slot] = checksum
            self._records.publish(slot, pending.key, rank, pending.shape, offset, checksum, origin, pending.promoted)
            pending.written.add(rank)
            if len(pending.written) == pending.shape[0]:
                complete.append(pending)
        return complete

    def reveal(self, complete: list[Pending]) -> list[int]:
        """Make written chunks visible; returns their entries in the same order."""
        entries = []
        fresh = []
        for pending in complete:
            del self.pending[pending.key]
            slots = [pending.slots[rank] for rank in range(pending.shape[0])]
            entries.append(self._index.add(pending.key, pending.shape[1], slots))
            if not pending.promoted:
                fresh.append(entries[-1])
        self._room.unwritten.add(reversed(fresh))
        self._room.changed()
        return entries

    def doom(self, pending: Pending) -> None:
        """This chunk will never be complete: committed extents go at once, the others as reservations resolve."""
        if pending.doomed:
            return
        pending.doomed = True
        del self.pending[pending.key]
        for rank in pending.written:
            self._room.give_back(pending.slots[rank])

    def discard(self, claim: Claim) -> None:
        """Give a reservation's extents back: its writer has said so, or is gone, or never could write."""
        for pending, _, slot in claim.parts:
            self.doom(pending)
            self._room.give_back(slot)

    def expire(self, ticket: int) -> None:
        """A reservation has run out. Where its writer can still write, its extents wait for that to be over."""
        claim = self.take(ticket)
        writer = self.writers.get(claim.owner, NO_WRITER)
        if writer == NO_WRITER:
            self.discard(claim)
            return
        for pending, _, _ in claim.parts:
            self.doom(pending)
        self.aside[ticket] = Aside(claim.owner, writer, [slot for _, _, slot in claim.parts])

    def settle(self, ticket: int) -> None:
        """The writer of a set-aside reservation is done or gone."""
        for slot in self.aside.pop(ticket).slots:
            self._room.give_back(slot)
