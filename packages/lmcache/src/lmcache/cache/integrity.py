"""The cache's books against each other: what must hold after every verb."""

from __future__ import annotations

from collections import Counter

from lmcache.cache.base import IntegrityError
from lmcache.cache.claims import Claims
from lmcache.cache.extents import Extents
from lmcache.cache.index import Index
from lmcache.cache.leases import Leases
from lmcache.cache.quotas import Quotas
from lmcache.cache.records import COMMITTED, RESERVED, Records, is_clear, parse
from lmcache.cache.room import Room


def check(
    index: Index, extents: Extents, records: Records, leases: Leases, claims: Claims, quotas: Quotas, room: Room
) -> None:
    """Compare everything with everything.

    Raises:
        IntegrityError: naming the first contradiction.
    """
    visible = {slot: entry for entry in index.by_key.values() for slot in index.slots(entry)}
    hidden = {slot for entry in leases.quarantined for slot in index.slots(entry)}
    written = {pending.slots[rank] for pending in claims.pending.values() for rank in pending.written}
    reserved = {slot for claim in claims.by_ticket.values() for _, _, slot in claim.parts}
    aside = {slot for held in claims.aside.values() for slot in held.slots}
    groups = (set(visible), hidden, written, reserved, aside)
    taken = set().union(*groups)
    held = extents.check()
    _expect(len(taken) == sum(map(len, groups)), "a slot belongs to two holders")
    _expect(set(held.values()) == taken and len(held) == len(taken), "extents and their holders do not agree")
    _expect(all(index.offset[slot] == offset for offset, slot in held.items()), "a slot names another extent")
    free = index.free_slots()
    _expect(len(set(free)) == len(free) and not taken & set(free), "a slot is both free and held, or free twice")
    _expect(len(free) + len(taken) == index.num_slots, "free + held slots are not all slots")
    _expect(sorted(quotas.victims()) == sorted(index.by_key.values()), "policy and index do not hold the same entries")
    _check_entries(index, visible)
    _check_accounts(index, extents, room, quotas, taken)
    _check_leases(index, leases, room)
    _check_claims(claims)
    _check_records(index, records, visible, written, reserved | aside)


def _expect(holds: bool, sentence: str) -> None:
    if not holds:
        raise IntegrityError(sentence)


def _check_entries(index: Index, visible: dict[int, int]) -> None:
    for key, entry in index.by_key.items():
        slots = index.slots(entry)
        _expect(index.keys[entry] == key, "an entry does not know its key")
        _expect(len(slots) == index.world_size[entry], "an entry has not one slot a rank")
        _expect(all(index.entry[slot] == entry for slot in slots), "a slot does not know its entry")
    for slot, entry in enumerate(index.entry):
        _expect(entry == 0 or slot in visible or index.keys[entry] == b"", "a slot names an entry that is not its own")


def _check_accounts(index: Index, extents: Extents, room: Room, quotas: Quotas, taken: set[int]) -> None:
    used: Counter[bytes] = Counter()
    for slot in taken:
        used[room.origins.tenant(index.origin[slot])] += extents.piece_at(index.offset[slot]).size
    _expect(dict(used) == quotas.tenant_bytes(), "the bytes of tenants are miscounted")
    _expect(set(room.unwritten) <= set(index.by_key.values()), "an entry that is gone waits to be written")


def _check_leases(index: Index, leases: Leases, room: Room) -> None:
    counts = Counter(entry for lease in leases.by_id.values() for entry in lease.entries)
    _expect(dict(counts) == room.leased, "leases and pinned entries do not agree")
    _expect(sum(map(leases.entry_bytes, room.leased)) == leases.bytes, "leased bytes are miscounted")
    _expect(leases.quarantined <= set(room.leased), "a quarantined entry that nobody leases was kept")
    present = set(index.by_key.values()) | leases.quarantined
    _expect(set(room.leased) <= present, "a leased entry is gone")
    owned = {lease for held in leases.of_owner.values() for lease in held}
    _expect(owned == set(leases.by_id), "owners and leases do not agree")


def _check_claims(claims: Claims) -> None:
    owned = {ticket for held in claims.of_owner.values() for ticket in held}
    _expect(owned == set(claims.by_ticket), "owners and reservations do not agree")
    for key, pending in claims.pending.items():
        _expect(pending.key == key and not pending.doomed, "a doomed chunk is still pending")
        _expect(len(pending.written) < pending.shape[0], "a complete chunk is not visible")


def _check_records(
    index: Index, records: Records, visible: dict[int, int], written: set[int], reserved: set[int]
) -> None:
    image = records.image()
    for slot in range(index.num_slots):
        entry = visible.get(slot, 0)
        if not entry and slot not in written and slot not in reserved:
            _expect(is_clear(image, slot), f"slot {slot} is free, its record is not")
            continue
        record = parse(image, slot)
        state = RESERVED if slot in reserved else COMMITTED
        if record is None or record.state != state or record.offset != index.offset[slot]:
            raise IntegrityError(f"the record of slot {slot} does not say what the index says")
        if entry:
            same = record.key == index.keys[entry] and record.length == index.extent_bytes[entry]
            _expect(same and record.checksum == index.checksum[slot], f"the record of slot {slot} is of another chunk")
