"""Leases: entries pinned for an owner, for a limited time."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.cache.base import PAGE_BYTES, Limits, Owner
from lmcache.cache.evict.base import Policy
from lmcache.cache.index import Index
from lmcache.cache.origins import NAMESPACE
from lmcache.cache.quarantine import Quarantine
from lmcache.cache.records import Records
from lmcache.cache.room import Room


class Lease:
    """What one lookup pinned, in prompt order, or one chunk that is being written to the tiers (``writes``)."""

    __slots__ = ("entries", "expires", "owner", "writes")

    def __init__(self, owner: Owner, expires: float, entries: list[int], writes: bool) -> None:
        self.owner = owner
        self.expires = expires
        self.entries = entries
        self.writes = writes


class Leases:
    """All leases, oldest first, and what was quarantined while leased."""

    def __init__(
        self, room: Room, index: Index, policy: Policy, records: Records, limits: Limits, quarantine: Quarantine
    ) -> None:
        self.by_id: dict[int, Lease] = {}
        self.of_owner: dict[Owner, set[int]] = {}
        self.bytes = 0
        self.quarantined: set[int] = set()  # hidden entries whose extents wait for the end of their last lease
        self._room = room
        self._index = index
        self._policy = policy
        self._records = records
        self._limits = limits
        self._quarantine = quarantine

    def entry_bytes(self, entry: int) -> int:
        """Pool bytes that an entry takes with all its ranks."""
        extent_bytes = -(-self._index.extent_bytes[entry] // PAGE_BYTES) * PAGE_BYTES
        return extent_bytes * self._index.world_size[entry]

    def pin(self, entries: Sequence[int], limit_bytes: float) -> int:
        """Pin leading entries as far as the limit on leased bytes allows; returns how many."""
        if len(self.by_id) >= self._limits.leases_max:
            return 0
        leased, length, world = self._room.leased, self._index.extent_bytes, self._index.world_size
        leased_bytes = self.bytes
        for num, entry in enumerate(entries):
            if entry in leased:
                leased[entry] += 1
                continue
            leased_bytes += -(-length[entry] // PAGE_BYTES) * PAGE_BYTES * world[entry]
            if leased_bytes > limit_bytes:
                return num
            leased[entry] = 1
            self.bytes = leased_bytes
        return len(entries)

    def add(self, lease: int, owner: Owner, expires: float, entries: list[int], *, writes: bool = False) -> None:
        """Record the owner of pinned entries."""
        self.by_id[lease] = Lease(owner, expires, entries, writes)
        self.of_owner.setdefault(owner, set()).add(lease)

    def end(self, lease: int) -> None:
        """Unpin; what nobody holds any more and is quarantined gives its extents back.

        A chunk that was being written, and of which nobody said that the tiers have it, waits for another turn.
        """
        ended = self.by_id.pop(lease)
        owned = self.of_owner[ended.owner]
        owned.discard(lease)
        if not owned:
            del self.of_owner[ended.owner]
        if ended.writes:
            self._room.unwritten.add(entry for entry in ended.entries if entry not in self.quarantined)
        leased = self._room.leased
        for entry in ended.entries:
            count = leased[entry] - 1
            if count:
                leased[entry] = count
                continue
            del leased[entry]
            self.bytes -= self.entry_bytes(entry)
            if entry in self.quarantined:
                self.quarantined.discard(entry)
                self._room.bury(entry)
        self._room.changed()

    def quarantine(self, lease: int, failed: Sequence[int]) -> list[bytes]:
        """Take entries of a lease, named by position, out of the index; positions outside it name nothing.

        Returns their keys.
        """
        entries = self.by_id[lease].entries
        keys = []
        for position in failed:
            if not 0 <= position < len(entries) or entries[position] in self.quarantined:
                continue
            entry = entries[position]
            key = self._index.keys[entry]
            keys.append(key)
            origin = self._room.origins.of(self._index.origin[self._index.first_slot(entry)])
            # A release names chunks, not ranks: with one rank it is that one.
            self._quarantine.note(key, origin[NAMESPACE], 0 if self._index.world_size[entry] == 1 else None)
            self._policy.remove(entry)
            self._room.unwritten.take(entry)
            self._index.hide(entry)
            for slot in self._index.slots(entry):
                self._records.clear(slot)
            self.quarantined.add(entry)
        return keys
