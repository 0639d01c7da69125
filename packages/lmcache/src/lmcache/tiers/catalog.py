"""What a tier that manages its own room knows: each object's bytes and tenant, and which was used longest ago.

Every operation takes the same time however many objects there are, an object costs about 200 bytes, and nothing here
does I/O or locks: all calls come from one thread. Two rings run through the same slots, in the order of use: one
through all objects, one through each tenant's. A ring is closed by a slot that is no object: slot 0 for all of them,
one for each tenant; there, the bytes are the sum over the ring and the key is the tenant's.
"""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from lmcache.tiers.base import Share


@dataclass(frozen=True, slots=True)
class Victim:
    """An object that has to go. The catalog does not know it any more."""

    key: bytes
    num_bytes: int


@dataclass(frozen=True, slots=True)
class _Coming:
    num_bytes: int
    tenant: bytes
    growth_bytes: int  # of all objects, when it is there
    own_growth_bytes: int  # of its tenant's


class Catalog:
    """The objects of one tier. ``capacity_bytes`` may be changed at any time; the next ``reserve`` goes by it.

    Keys that are *held* (somebody reads or writes them) are never victims.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.num_evicted = 0
        self._held: set[bytes] = set()
        self._coming: dict[bytes, _Coming] = {}
        self._coming_bytes = 0
        self._coming_of: defaultdict[bytes, int] = defaultdict(int)  # by tenant
        self._reset()

    def _reset(self) -> None:
        self._slots: dict[bytes, int] = {}
        self._tenants: dict[bytes, int] = {}
        self._keys: list[bytes] = [b""]
        self._bytes = array("q", [0])
        self._owner = array("i", [0])  # slot that closes the tenant's ring
        self._all = _Rings()
        self._own = _Rings()
        self._free: list[int] = []

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, key: bytes) -> bool:
        return key in self._slots

    @property
    def num_bytes(self) -> int:
        """Of all objects; what is reserved for does not count yet."""
        return self._bytes[0]

    def size(self, key: bytes) -> int:
        """Bytes of an object; 0 where it is not known."""
        slot = self._slots.get(key)
        return 0 if slot is None else self._bytes[slot]

    def tenant_bytes(self) -> dict[bytes, int]:
        """Bytes by tenant, of those that have objects."""
        return {tenant: self._bytes[ring] for tenant, ring in self._tenants.items()}

    def add(self, key: bytes, num_bytes: int, tenant: bytes) -> None:
        """An object is there, in place of one of the same key; it counts as used just now."""
        self.remove(key)
        ring = self._tenants.get(tenant)
        if ring is None:
            ring = self._tenants[tenant] = self._take(tenant)
        slot = self._slots[key] = self._take(key)
        self._owner[slot] = ring
        self._bytes[slot] = num_bytes
        self._bytes[ring] += num_bytes
        self._bytes[0] += num_bytes
        self._all.insert(slot, 0)
        self._own.insert(slot, ring)

    def remove(self, key: bytes) -> None:
        """An object is gone; fine if it was not known."""
        slot = self._slots.pop(key, None)
        if slot is None:
            return
        ring = self._owner[slot]
        self._bytes[0] -= self._bytes[slot]
        self._bytes[ring] -= self._bytes[slot]
        self._all.take_out(slot)
        self._own.take_out(slot)
        self._give(slot)
        if self._own.after[ring] == ring:
            del self._tenants[self._keys[ring]]
            self._give(ring)

    def clear(self) -> None:
        """All objects are gone."""
        self._reset()

    def touch(self, key: bytes) -> None:
        """An object was used just now; fine if it is not known."""
        self._move(key, True)

    def demote(self, key: bytes) -> None:
        """An object was used before all others; fine if it is not known."""
        self._move(key, False)

    def hold(self, key: bytes) -> None:
        """Keep a key from being a victim."""
        self._held.add(key)

    def release(self, key: bytes) -> None:
        """Undo ``hold``."""
        self._held.discard(key)

    def reserve(self, key: bytes, num_bytes: int, share: Share) -> list[Victim] | None:
        """Find room for an object that is about to be written; its key is held until ``settle``.

        Returns:
            What it pushes out, to be removed before it is written: what a tenant has beyond its limit goes out of its
            own objects, oldest first. None, and nothing is changed: it does not fit.
        """
        slot = self._slots.get(key)
        before = 0 if slot is None else self._bytes[slot]
        is_own = slot is not None and self._keys[self._owner[slot]] == share.tenant
        coming = _Coming(num_bytes, share.tenant, max(0, num_bytes - before), max(0, num_bytes - before * is_own))
        self._held.add(key)
        slots = self._victims(coming, share.limit_bytes)
        if slots is None:
            self._held.discard(key)
            return None
        self._coming[key] = coming
        self._coming_bytes += coming.growth_bytes
        self._coming_of[share.tenant] += coming.own_growth_bytes
        return self._evict(slots)

    def settle(self, key: bytes, stored: bool) -> None:
        """The write that was reserved for is over; if it failed, what was before is what is there."""
        coming = self._coming.pop(key)
        self._coming_bytes -= coming.growth_bytes
        self._coming_of[coming.tenant] -= coming.own_growth_bytes
        if not self._coming_of[coming.tenant]:
            del self._coming_of[coming.tenant]
        self._held.discard(key)
        if stored:
            self.add(key, coming.num_bytes, coming.tenant)

    def surplus(self, objects_max: int) -> list[Victim]:
        """The oldest of what is beyond the capacity, so many at most."""
        over = self._bytes[0] + self._coming_bytes - self.capacity_bytes
        slots: list[int] = []
        for slot in self._from_oldest(self._all, 0):
            if over <= 0 or len(slots) == objects_max:
                break
            over -= self._bytes[slot]
            slots.append(slot)
        return self._evict(slots)

    def _victims(self, coming: _Coming, limit_bytes: int | None) -> list[int] | None:
        chosen: dict[int, None] = {}
        over = self._bytes[0] + self._coming_bytes + coming.growth_bytes - self.capacity_bytes
        if limit_bytes is not None:
            ring = self._tenants.get(coming.tenant, 0)
            own_bytes = self._bytes[ring] if ring else 0
            own_over = own_bytes + self._coming_of.get(coming.tenant, 0) + coming.own_growth_bytes - limit_bytes
            for slot in self._from_oldest(self._own, ring) if ring else ():
                if own_over <= 0:
                    break
                own_over -= self._bytes[slot]
                over -= self._bytes[slot]
                chosen[slot] = None
            if own_over > 0:
                return None
        for slot in self._from_oldest(self._all, 0):
            if over <= 0:
                break
            if slot not in chosen:
                over -= self._bytes[slot]
                chosen[slot] = None
        return None if over > 0 else list(chosen)

    def _from_oldest(self, rings: _Rings, ring: int) -> Iterator[int]:
        slot = rings.after[ring]
        while slot != ring:
            if self._keys[slot] not in self._held:
                yield slot
            slot = rings.after[slot]

    def _evict(self, slots: list[int]) -> list[Victim]:
        victims = [Victim(self._keys[slot], self._bytes[slot]) for slot in slots]
        for victim in victims:
            self.remove(victim.key)
        self.num_evicted += len(victims)
        return victims

    def _move(self, key: bytes, is_newest: bool) -> None:
        slot = self._slots.get(key)
        if slot is None:
            return
        for rings, ring in ((self._all, 0), (self._own, self._owner[slot])):
            rings.take_out(slot)
            rings.insert(slot, ring if is_newest else rings.after[ring])

    def _take(self, key: bytes) -> int:
        """A slot that is in no ring but its own."""
        if self._free:
            slot = self._free.pop()
            self._keys[slot] = key
            self._bytes[slot] = 0
        else:
            slot = len(self._keys)
            self._keys.append(key)
            self._bytes.append(0)
            self._owner.append(0)
            self._all.grow()
            self._own.grow()
        self._own.close(slot)
        return slot

    def _give(self, slot: int) -> None:
        self._keys[slot] = b""
        self._free.append(slot)


class _Rings:
    """Doubly linked rings over slots. Going ``after`` from the slot that closes a ring is going from the oldest."""

    def __init__(self) -> None:
        self.before, self.after = array("i", [0]), array("i", [0])

    def grow(self) -> None:
        self.before.append(0)
        self.after.append(0)

    def close(self, slot: int) -> None:
        self.before[slot] = self.after[slot] = slot

    def insert(self, slot: int, before: int) -> None:
        """Put a slot before another one; before the one that closes the ring is the newest place."""
        behind = self.before[before]
        self.before[slot], self.after[slot] = behind, before
        self.after[behind] = self.before[before] = slot

    def take_out(self, slot: int) -> None:
        behind, before = self.before[slot], self.after[slot]
        self.after[behind], self.before[before] = before, behind
