"""Which chunks are held: the visible entries, in arrays rather than objects.

An entry (an integer from 1 up) is one chunk; it owns one slot for each rank, chained in rank order. A slot (from 0
up) is one extent and one record of the records file. At a million entries of one rank this takes about 190 bytes
each, nearly all of it the dictionary from key to entry, and gives the garbage collector nothing to walk through.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

from lmcache.keys import KEY_BYTES

_END = -1
_STRIDE_BYTES = 32 * KEY_BYTES  # so far a lookup goes on at once: beyond the first chunk that is missing, at most


class Index:
    """Entries and slots. ``slots_max`` bounds the slots, and so the entries."""

    def __init__(self, slots_max: int) -> None:
        self.slots_max = slots_max
        self.by_key: dict[bytes, int] = {}
        self.keys: list[bytes] = [b""]
        self.world_size = array("H", [0])
        self.extent_bytes = array("I", [0])
        self._first_slot = array("i", [_END])
        self._free_entries = array("i")
        self.offset = array("Q")
        self.checksum = array("Q")
        self.entry = array("i")  # the visible entry of a slot, 0 for none
        self.origin = array("I")  # number of a slot's origin, see origins.py
        self._next_slot = array("i")
        self._free_slots = array("i")

    def prefix(self, keys: bytes) -> list[int]:
        """Entries of the longest held prefix of concatenated keys. Looks at up to 31 keys beyond it."""
        get = self.by_key.get
        first = get(keys[:KEY_BYTES])
        entries: list[int] = []
        if first is None:
            return entries
        for start in range(0, len(keys), _STRIDE_BYTES):
            links = [keys[at : at + KEY_BYTES] for at in range(start, min(start + _STRIDE_BYTES, len(keys)), KEY_BYTES)]
            found = list(map(get, links))
            if None in found:
                entries += found[: found.index(None)]  # type: ignore[arg-type]
                return entries
            entries += found  # type: ignore[arg-type]
        return entries

    def take_slot(self) -> int | None:
        """A free slot; None when all are taken."""
        if self._free_slots:
            return self._free_slots.pop()
        slot = len(self.offset)
        if slot >= self.slots_max:
            return None
        self.reserve_slots(slot + 1)
        return slot

    def reserve_slots(self, num_slots: int) -> None:
        """Let the slots below ``num_slots`` exist, the new ones taken."""
        missing = num_slots - len(self.offset)
        if missing > 0:
            for column in (self.offset, self.checksum, self.entry, self.origin):
                column.extend([0] * missing)
            self._next_slot.extend([_END] * missing)

    def give_slot(self, slot: int) -> None:
        """A slot is free again."""
        self._free_slots.append(slot)

    def add(self, key: bytes, extent_bytes: int, slots: Sequence[int]) -> int:
        """Make a chunk visible; ``slots`` are in rank order, their offsets and checksums are set already."""
        if self._free_entries:
            entry = self._free_entries.pop()
        else:
            entry = len(self.keys)
            self.keys.append(b"")
            for column in (self.world_size, self.extent_bytes, self._first_slot):
                column.append(0)
        self.keys[entry] = key
        self.world_size[entry] = len(slots)
        self.extent_bytes[entry] = extent_bytes
        self._first_slot[entry] = slots[0]
        for slot, after in zip(slots, [*slots[1:], _END], strict=True):
            self.entry[slot] = entry
            self._next_slot[slot] = after
        self.by_key[key] = entry
        return entry

    def hide(self, entry: int) -> None:
        """No lookup finds this entry any more; it keeps its number and its slots."""
        del self.by_key[self.keys[entry]]
        self.keys[entry] = b""

    def drop(self, entry: int) -> None:
        """The number of a hidden entry is free again; its slots are the caller's."""
        for slot in self.slots(entry):
            self.entry[slot] = 0
        self.world_size[entry] = 0
        self._free_entries.append(entry)

    def slots(self, entry: int) -> list[int]:
        """Slots of an entry in rank order."""
        slots = []
        slot = self._first_slot[entry]
        while slot != _END:
            slots.append(slot)
            slot = self._next_slot[slot]
        return slots

    def first_slot(self, entry: int) -> int:
        """The slot of rank 0; all slots of an entry have the same origin."""
        return self._first_slot[entry]

    def details(self, entries: Sequence[int]) -> tuple[list[int], list[int]]:
        """Offsets and checksums, entry-major then rank."""
        first, after, world = self._first_slot, self._next_slot, self.world_size
        slots = [first[entry] for entry in entries]
        if max(map(world.__getitem__, entries), default=1) > 1:
            slots = []
            for entry in entries:
                slot = first[entry]
                slots.append(slot)
                for _ in range(world[entry] - 1):
                    slot = after[slot]
                    slots.append(slot)
        offset, checksum = self.offset, self.checksum
        return [offset[slot] for slot in slots], [checksum[slot] for slot in slots]

    @property
    def num_slots(self) -> int:
        """Slots that exist, taken or free."""
        return len(self.offset)

    def free_slots(self) -> list[int]:
        """Slots that are free, for checks."""
        return self._free_slots.tolist()

    def load_slots(self, offset: array[int], checksum: array[int], origin: array[int]) -> None:
        """Let as many slots exist as the columns are long, all of them taken; there were none before."""
        self.offset, self.checksum, self.origin = offset, checksum, origin
        self.entry = array("i", [0]) * len(offset)
        self._next_slot = array("i", [_END]) * len(offset)

    def add_many(self, keys: Sequence[bytes], extent_bytes: Sequence[int], ranks: Sequence[Sequence[int]]) -> range:
        """As ``add``, for many chunks of one world size, before any was dropped; returns their entries.

        ``ranks``: for each rank, a slot a chunk.
        """
        entries = range(len(self.keys), len(self.keys) + len(keys))
        self.keys.extend(keys)
        self.by_key.update(zip(keys, entries, strict=True))
        self.extent_bytes.extend(extent_bytes)
        self.world_size.extend(array("H", [len(ranks)]) * len(keys))
        self._first_slot.extend(ranks[0])
        entry_of, next_slot = self.entry, self._next_slot
        for slots in ranks:
            if isinstance(slots, range):
                entry_of[slots.start : slots.stop : slots.step] = array("i", entries)
                continue
            for slot, entry in zip(slots, entries, strict=True):
                entry_of[slot] = entry
        for before, after in pairwise(ranks):
            for slot, follower in zip(before, after, strict=True):
                next_slot[slot] = follower
        return entries

    def give_slots(self, slots: Sequence[int]) -> None:
        """These slots are free again; the last one is taken first."""
        self._free_slots.extend(slots)
