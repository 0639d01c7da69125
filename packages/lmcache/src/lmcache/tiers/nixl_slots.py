"""Which slot of a pool holds which object, and which gives way to the next. In memory only, and of one thread."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import dataclass

from lmcache.tiers.base import Share
from lmcache.tiers.catalog import Catalog


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object shall be written. All slots named here are the writer's alone until it gives them back."""

    slot: int
    fresh: bool  # the file system has not given its room yet
    wipe: tuple[int, ...]  # slots with a header of an object that is gone; ``slot`` may be among them


class Slots:
    """``count`` slots of ``slot_bytes``, of which the first ``num_written`` were written before."""

    def __init__(self, count: int, slot_bytes: int, num_written: int = 0) -> None:
        self.count = count
        self.slot_bytes = slot_bytes
        self.fresh_refused = False  # the file system is full: only slots that it has given already are used
        self.objects = Catalog(sys.maxsize)  # whose room is counted here, in slots
        self._slots: dict[bytes, int] = {}
        self._free: list[int] = []
        self._unwiped: set[int] = set()  # free slots with a header of an object that is gone
        self._ungiven: list[int] = []  # slots below ``num_written`` that the file system refused
        self._num_written = num_written

    def slot(self, key: bytes) -> int | None:
        """Where an object lies."""
        return self._slots.get(key)

    def found(self, slot: int, key: bytes, num_bytes: int, tenant: bytes) -> None:
        """A written slot holds an object."""
        if key in self._slots:  # a death between the new copy and the end of the old one
            self.release([slot], wiped=False)
            return
        self.objects.add(key, num_bytes, tenant)
        self._slots[key] = slot

    def reserve(self, key: bytes, num_bytes: int, share: Share) -> Place | None:
        """A slot for an object, taken from others where need be; None where there is no room for it. ``settle``
        follows."""
        victims = self.objects.reserve(key, num_bytes, share) if num_bytes <= self.slot_bytes else None
        if victims is None:
            return None
        taken = [self._slots.pop(victim.key) for victim in victims]
        has_fresh = not self.fresh_refused and bool(self._ungiven or self._num_written < self.count)
        if not taken and not self._free and not has_fresh:
            taken = self._oldest(key)
            if not taken:
                self.objects.settle(key, False)
                return None
        fresh = False
        if taken:
            slot = taken[0]
        elif self._free:
            slot = self._free.pop()
        elif self._ungiven:
            slot, fresh = self._ungiven.pop(), True
        else:
            slot, fresh = self._num_written, True
            self._num_written += 1
        if slot in self._unwiped:
            self._unwiped.remove(slot)
            taken.append(slot)
        return Place(slot, fresh, tuple(taken))

    def settle(self, key: bytes, place: Place, stored: bool) -> None:
        """The write is over. If it failed, an older object of the same key is still there, and any slot may hold a
        header."""
        self.objects.settle(key, stored)
        if not stored:
            self.release({place.slot, *place.wipe}, wiped=False)
            return
        ended = [slot for slot in place.wipe if slot != place.slot]
        if key in self._slots:
            ended.append(self._slots[key])
        self._slots[key] = place.slot
        self.release(ended, wiped=True)

    def refused(self, key: bytes, place: Place) -> None:
        """The write is over: the file system has no room for a fresh slot."""
        self.objects.settle(key, False)
        self._ungiven.append(place.slot)

    def forget(self, key: bytes) -> int:
        """Take an object out; its slot stays taken until it is released."""
        self.objects.remove(key)
        return self._slots.pop(key)

    def release(self, slots: Collection[int], wiped: bool) -> None:
        """Slots are free again; ``wiped`` says that no header can be read in them."""
        self._free.extend(slots)
        if not wiped:
            self._unwiped.update(slots)

    def _oldest(self, key: bytes) -> list[int]:
        """The slot of the object that was used longest ago; that of ``key`` itself where it has the last one."""
        self.objects.capacity_bytes = 0
        victims = self.objects.surplus(1)
        self.objects.capacity_bytes = sys.maxsize
        if victims:
            return [self._slots.pop(victims[0].key)]
        return [self.forget(key)] if key in self._slots else []
