"""What a server finds again of the one before it: the chunks whose records are whole and do not contradict each other.

Reading costs about 8 us a record and 128 bytes of memory a slot, once, at a start after an unclean death.
"""

from __future__ import annotations

from lmcache.cache.base import NO_WRITER, PAGE_BYTES
from lmcache.cache.claims import Aside, Claims
from lmcache.cache.evict.base import Policy
from lmcache.cache.extents import Extents
from lmcache.cache.index import Index
from lmcache.cache.pool import Pool
from lmcache.cache.records import COMMITTED, RECORD_BYTES, RESERVED, Record, Records, is_clear, parse

Committed = dict[bytes, list[tuple[int, int, int]]]  # key -> (sequence, rank, slot) of its committed records


def adopt(pool: Pool, records: Records, index: Index, extents: Extents, policy: Policy, claims: Claims) -> int:
    """Fill index, extents and policy from the records; returns how many entries became visible.

    Adopted is a chunk all of whose ranks have a COMMITTED record with a right CRC, inside the pool's ready part, that
    overlaps nothing. An extent that was RESERVED stays aside while its writer lives. Every other record is cleared.
    """
    image = records.image()
    num_slots = min(len(image) // RECORD_BYTES, index.slots_max)
    index.reserve_slots(num_slots)
    taken = bytearray(num_slots)
    committed: Committed = {}
    alive: dict[int, bool] = {NO_WRITER: False}
    for slot in range(num_slots):
        record = parse(image, slot)
        if record is None or not _is_sound(record):
            continue
        records.sequence = max(records.sequence, record.sequence)
        if record.state == COMMITTED:
            committed.setdefault(record.key, []).append((record.sequence, record.rank, slot))
        elif record.state == RESERVED:
            if record.writer not in alive:
                alive[record.writer] = pool.writer_alive(record.writer)
            if alive[record.writer] and extents.place(record.offset, _size(record), slot):
                taken[slot] = 1
                index.offset[slot] = record.offset
                claims.aside[-1 - slot] = Aside(None, record.writer, [slot])
    entries = _place(image, committed, index, extents, taken)
    extents.placed()
    for slot in range(num_slots - 1, -1, -1):
        if not taken[slot]:
            index.give_slot(slot)
            if not is_clear(image, slot):
                records.clear(slot)
    records.flush()
    policy.insert(entries)
    return len(entries)


def _place(image: bytes, committed: Committed, index: Index, extents: Extents, taken: bytearray) -> list[int]:
    """Make complete chunks visible; returns their entries, oldest first. Where two overlap, the newer one stays."""
    entries = []
    for key in sorted(committed, key=lambda key: max(committed[key]), reverse=True):
        slots = [slot for _, _, slot in sorted(committed[key], key=lambda part: part[1])]
        parts = [record for slot in slots if (record := parse(image, slot)) is not None]
        shape = (parts[0].world_size, parts[0].length)
        same = all((part.world_size, part.length) == shape for part in parts)
        if not same or [part.rank for part in parts] != list(range(shape[0])):
            continue
        placed: list[int] = []
        for slot, part in zip(slots, parts, strict=True):
            if not extents.place(part.offset, _size(part), slot):
                break
            placed.append(part.offset)
        if len(placed) < len(parts):
            for offset in placed:
                extents.unplace(offset)
            continue
        for slot, part in zip(slots, parts, strict=True):
            taken[slot] = 1
            index.offset[slot] = part.offset
            index.checksum[slot] = part.checksum
        entries.append(index.add(key, shape[1], slots))
    entries.reverse()
    return entries


def _is_sound(record: Record) -> bool:
    return record.rank < record.world_size and record.length > 0 and record.offset % PAGE_BYTES == 0


def _size(record: Record) -> int:
    return -(-record.length // PAGE_BYTES) * PAGE_BYTES
