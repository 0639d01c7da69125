"""What a server finds again of the one before it: the chunks whose records are whole and do not contradict each other.

Once, at a start: about 1 us a record, 2 where chunks have several ranks, and 0.5 kB of memory each meanwhile. To be
that quick it goes through all records column by column, and looks at single ones only where they contradict each other.
"""

from __future__ import annotations

import gc
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import compress
from typing import TypeVar

from lmcache.cache.base import NO_WRITER, PAGE_BYTES
from lmcache.cache.claims import Aside, Claims
from lmcache.cache.extents import Extents
from lmcache.cache.index import Index
from lmcache.cache.origins import Origins
from lmcache.cache.pool import Pool
from lmcache.cache.quotas import Quotas
from lmcache.cache.records import COMMITTED, RECORD_BYTES, RESERVED, Columns, Records, is_clear, part_of
from lmcache.keys import TENANT_BYTES

_T = TypeVar("_T")

Slots = Sequence[int]
"""Slots by their numbers; ``range`` where it is all of them."""

Chunks = list[Slots]
"""Complete chunks of one world size: for each rank, a slot a chunk."""


_SPAN_EACH = 4


@dataclass(frozen=True, slots=True)
class Adopted:
    """What was found again."""

    num_entries: int
    dirty: list[int]  # entries that the tiers below did not have when their records were written, oldest first


def adopt(
    pool: Pool, records: Records, index: Index, extents: Extents, origins: Origins, quotas: Quotas, claims: Claims
) -> Adopted:
    """Fill the empty books from the records.

    Adopted is a chunk all of whose ranks have a COMMITTED record with a right CRC, inside the pool's ready part, that
    overlaps nothing; where two overlap, the newer one stays. An extent that was RESERVED stays aside while its writer
    lives. Every other record is cleared.
    """
    with _no_collection():
        image = records.image()
        columns = Columns(image, min(len(image) // RECORD_BYTES, index.slots_max))
        records.sequence = max(_pick(columns.sequence, columns.slots), default=0)
        groups, reserved = _candidates(columns, pool)
        lost = _place(columns, groups, reserved, extents)
        extents.placed()
        if lost:
            reserved = [slot for slot in reserved if slot not in lost]
            groups = [_without(chunks, lost) for chunks in groups]
        taken = _all_slots(groups, reserved)
        index.load_slots(columns.offset, columns.checksum, _own(columns, taken, origins, quotas))
        for slot in reserved:
            claims.aside[-1 - slot] = Aside(None, columns.writer[slot], [slot])
        _free_others(image, taken, index, records)
        return _reveal(columns, groups, index, quotas)


@contextmanager
def _no_collection() -> Iterator[None]:
    """The collector would walk through all that is made here, again and again, and find nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _pick(column: Sequence[_T], slots: Slots) -> Sequence[_T]:
    return column if isinstance(slots, range) else [column[slot] for slot in slots]


def _by_item(column: Sequence[int], slots: Slots) -> dict[int, Slots]:
    """The slots of each item that occurs in a column."""
    items = set(_pick(column, slots))
    if len(items) == 1:
        return {items.pop(): slots}
    groups: dict[int, list[int]] = {item: [] for item in items}
    for slot in slots:
        groups[column[slot]].append(slot)
    return dict(groups)


def _size(length: int) -> int:
    """Pool bytes of an extent."""
    return -(-length // PAGE_BYTES) * PAGE_BYTES


def _all_slots(groups: list[Chunks], reserved: list[int]) -> Slots:
    columns = [slots for chunks in groups for slots in chunks]
    if len(columns) == 1 and not reserved:
        return columns[0]
    return [*reserved, *(slot for slots in columns for slot in slots)]


def _without(chunks: Chunks, lost: set[int]) -> Chunks:
    """Chunks but for those of which a slot is lost."""
    kept = [slots for slots in zip(*chunks, strict=True) if lost.isdisjoint(slots)]
    return [list(slots) for slots in zip(*kept, strict=True)] if kept else [[] for _ in chunks]


# --- what the records say on the face of it


def _candidates(columns: Columns, pool: Pool) -> tuple[list[Chunks], list[int]]:
    """Complete chunks by world size, and extents that a living writer may be writing to."""
    slots = columns.slots
    if 0 in columns.length:
        slots = [slot for slot in slots if columns.length[slot]]
    worlds: dict[int, dict[int, Slots]] = {}
    reserved: list[int] = []
    for word, of_word in _by_item(columns.part, slots).items():
        world, rank, state = part_of(word)
        if rank < world and state == COMMITTED:
            worlds.setdefault(world, {})[rank] = of_word
        elif rank < world and state == RESERVED:
            reserved += of_word
    groups = [
        _complete(columns, [ranks[rank] for rank in range(world)])
        for world, ranks in worlds.items()
        if len(ranks) == world
    ]
    if len(groups) > 1:
        single = set(_once(columns, [slot for chunks in groups for slot in chunks[0]]))
        groups = [_without(chunks, set(chunks[0]) - single) for chunks in groups]
    reserved.sort()
    writers = {columns.writer[slot] for slot in reserved} - {NO_WRITER}
    alive = {writer for writer in writers if pool.writer_alive(writer)}
    return groups, [slot for slot in reserved if columns.writer[slot] in alive]


def _once(columns: Columns, slots: Slots) -> Slots:
    """Those whose key no other of them has."""
    keys = _pick(columns.keys, slots)
    if len(set(keys)) == len(keys):
        return slots
    count = Counter(keys)
    return [slot for slot, key in zip(slots, keys, strict=True) if count[key] == 1]


def _complete(columns: Columns, ranks: Chunks) -> Chunks:
    """Chunks of which each rank has one record, all of the same length."""
    ranks = [_once(columns, slots) for slots in ranks]
    if len(ranks) == 1:
        return ranks
    by_key = [dict(zip(_pick(columns.keys, slots), slots, strict=True)) for slots in ranks]
    common = set(by_key[0]).intersection(*by_key[1:])
    keys = [key for key in by_key[0] if key in common]
    chunks: Chunks = [[held[key] for key in keys] for held in by_key]
    lengths = [_pick(columns.length, slots) for slots in chunks]
    if all(column == lengths[0] for column in lengths):
        return chunks
    uneven = {slots[0] for slots in zip(*chunks, strict=True) if len({columns.length[slot] for slot in slots}) > 1}
    return _without(chunks, uneven)


# --- what becomes of it


def _place(columns: Columns, groups: list[Chunks], reserved: list[int], extents: Extents) -> set[int]:
    """Take the extents of all candidates; returns slots of those that cannot have theirs, one a chunk at least."""
    slots, offset, length = _all_slots(groups, reserved), columns.offset, columns.length
    by_length = _by_item(length, slots)
    if len(by_length) == 1:
        classes = {_size(item): (_pick(offset, slots), slots) for item in by_length}
    else:
        lists: dict[int, tuple[list[int], list[int]]] = {_size(item): ([], []) for item in by_length}
        for item, of_length in by_length.items():
            lists[_size(item)][0].extend(_pick(offset, of_length))
            lists[_size(item)][1].extend(of_length)
        classes = dict(lists)
    contested = extents.place_many(classes)
    if not contested:
        return set()
    lost = {
        slot for slot in reserved if slot in contested and not extents.place(offset[slot], _size(length[slot]), slot)
    }
    chunks = [slots for group in groups for slots in zip(*group, strict=True) if not contested.isdisjoint(slots)]
    for parts in sorted(chunks, key=lambda parts: max(columns.sequence[slot] for slot in parts), reverse=True):
        taken = [slot for slot in parts if slot not in contested]
        for slot in contested.intersection(parts):
            if extents.place(offset[slot], _size(length[slot]), slot):
                taken.append(slot)
            else:
                lost.add(slot)
        if len(taken) < len(parts):
            for slot in taken:
                extents.unplace(offset[slot])
    return lost


def _own(columns: Columns, slots: Slots, origins: Origins, quotas: Quotas) -> array[int]:
    """Count what lies in ``slots`` to its tenants; returns the numbers of all slots' origins."""
    numbers = array("I", [0]) * len(columns.origins)
    for length, of_length in _by_item(columns.length, slots).items():
        for number, num in Counter(_pick(columns.origin, of_length)).items():
            origin = columns.origins[number]
            numbers[number] = origins.take(origin, num)
            quotas.add(origin[:TENANT_BYTES], _size(length) * num)
    return array("I", map(numbers.__getitem__, columns.origin))


def _free_others(image: bytes, taken: Slots, index: Index, records: Records) -> None:
    """Free all slots but these, and clear their records where there is something to clear."""
    if len(taken) == index.num_slots:
        return
    is_free = bytearray(b"\1") * index.num_slots
    for slot in taken:
        is_free[slot] = 0
    free = list(compress(range(index.num_slots - 1, -1, -1), reversed(is_free)))
    index.give_slots(free)
    for slot in free:
        if not is_clear(image, slot):
            records.clear(slot)
    records.flush()


def _reveal(columns: Columns, groups: list[Chunks], index: Index, quotas: Quotas) -> Adopted:
    """Make the chunks visible, the oldest first to go."""
    ages: list[int] = []
    is_clean = bytearray(1)
    for ranks in groups:
        index.add_many(_pick(columns.keys, ranks[0]), _pick(columns.length, ranks[0]), ranks)
        rank_ages = [_pick(columns.sequence, slots) for slots in ranks]
        ages += rank_ages[0] if len(ranks) == 1 else map(max, *rank_ages)
        rank_clean = [_pick(columns.clean, slots) for slots in ranks]
        is_clean += bytes(rank_clean[0] if len(ranks) == 1 else map(min, *rank_clean))
    entries = _by_age(ages)
    quotas.insert(entries)
    return Adopted(len(entries), [entry for entry in entries if not is_clean[entry]] if any(is_clean) else entries)


def _by_age(ages: Sequence[int]) -> list[int]:
    """Entries from 1 up, those with the smallest of ``ages`` first. No two are equal, and mostly they lie close."""
    first = min(ages, default=0)
    span = max(ages, default=0) + 1 - first
    if span <= _SPAN_EACH * len(ages):
        table = array("i", [0]) * span
        for entry, age in enumerate(ages, 1):
            table[age - first] = entry
        entries = [entry for entry in table if entry]
        if len(entries) == len(ages):
            return entries
    return sorted(range(1, len(ages) + 1), key=lambda entry: ages[entry - 1])
