"""Adoption against a plain, slow one, over records that were torn, flipped and made to contradict each other."""

from __future__ import annotations

import random

from cache_worlds import DIRECTORY, MIB
from hypothesis import event, given, settings
from hypothesis import strategies as st
from memory_files import ManualClock, MemoryFiles, SeededEntropy

from lmcache.cache import open_cache
from lmcache.cache.base import NO_WRITER, PAGE_BYTES, PIECE_BYTES
from lmcache.cache.records import COMMITTED, RECORD_BYTES, RESERVED, Record, parse
from lmcache.cache.store import Cache

POOL_BYTES = 200 * MIB
READY_BYTES = 186 * MIB
NUM_SLOTS = 160
LENGTHS = (2 * MIB, 2 * MIB - 1, 3 * MIB, MIB + 1)
ORIGINS = (bytes(40), b"\1" * 40, b"\2" * 40)
ALIVE, DEAD = 0, 77


def size_of(record: Record) -> int:
    return -(-record.length // PAGE_BYTES) * PAGE_BYTES


class Placed:
    """Which bytes are taken, extent by extent; a piece serves one size."""

    def __init__(self) -> None:
        self.taken: dict[int, int] = {}

    def place(self, record: Record) -> bool:
        size, offset = size_of(record), record.offset
        piece = offset // PIECE_BYTES
        for other, other_size in self.taken.items():
            if other // PIECE_BYTES == piece and (other_size != size or other == offset):
                return False
        if offset % PIECE_BYTES % size or offset % PIECE_BYTES + size > PIECE_BYTES or offset + size > READY_BYTES:
            return False
        self.taken[offset] = size
        return True


def expected(image: bytes) -> tuple[dict[bytes, list[int]], dict[int, int]]:
    """Slots of each visible chunk in rank order, and what is taken: one record after the other, the newest first."""
    sound = {
        slot: record
        for slot in range(len(image) // RECORD_BYTES)
        if (record := parse(image, slot)) and record.rank < record.world_size and record.length
    }
    placed = Placed()
    for record in sound.values():
        if record.state == RESERVED and record.writer == ALIVE:
            placed.place(record)
    chunks: dict[tuple[bytes, int], list[int]] = {}
    for slot, record in sound.items():
        if record.state == COMMITTED:
            chunks.setdefault((record.key, record.world_size), []).append(slot)
    complete: dict[bytes, list[list[int]]] = {}
    for (key, world), held in chunks.items():
        for rank in range(world):  # what is there twice is not there
            if sum(sound[slot].rank == rank for slot in held) > 1:
                held = [slot for slot in held if sound[slot].rank != rank]
        held.sort(key=lambda slot: sound[slot].rank)
        if len(held) == world and len({sound[slot].length for slot in held}) == 1:
            complete.setdefault(key, []).append(held)
    single = [variants[0] for variants in complete.values() if len(variants) == 1]
    visible = {}
    for held in sorted(single, key=lambda held: max(sound[slot].sequence for slot in held), reverse=True):
        done = []
        for slot in held:
            if not placed.place(sound[slot]):
                break
            done.append(sound[slot].offset)
        if len(done) == len(held):
            visible[sound[held[0]].key] = held
        else:
            for offset in done:
                del placed.taken[offset]
    return visible, placed.taken


def leave(source: random.Random, num_chunks: int, disorder: float) -> MemoryFiles:
    """A killed server's files: chunks mostly in their places, some not, with a probability of ``disorder``."""
    files = MemoryFiles()
    cache = start(files)
    cache.pool.grow(READY_BYTES)
    assert cache.pool.grant_descriptor()[1] == ALIVE
    free_slots = source.sample(range(NUM_SLOTS), NUM_SLOTS)
    free: dict[int, list[int]] = {length: [] for length in LENGTHS}
    for piece in range(3):
        length = source.choice(LENGTHS)
        size = -(-length // PAGE_BYTES) * PAGE_BYTES
        places = PIECE_BYTES // size
        free[length] += [piece * PIECE_BYTES + place * size for place in source.sample(range(places), places)]
    used: list[int] = []
    for number in range(num_chunks):
        length = source.choice([length for length in LENGTHS if free[length]] or LENGTHS)
        if source.random() < disorder:
            length = source.choice(LENGTHS)
        world = source.choice((1, 1, 1, 2, 3))
        is_reserved, is_clean = source.random() < 0.1, source.random() < 0.5
        key = bytes([source.randrange(number + 1) if source.random() < disorder / 4 else number]) * 32
        for rank in range(world):
            if source.random() < disorder / 4:
                continue
            offset = free[length].pop() if free[length] and source.random() > disorder else source.choice([*used, 0])
            if source.random() < disorder / 8:
                offset = source.choice((PAGE_BYTES + 512, POOL_BYTES, 1 << 62, READY_BYTES - PAGE_BYTES))
            used.append(offset)
            slot = free_slots.pop()
            assert cache._records.back(slot)
            shape, origin = (world, length), ORIGINS[number % 3]
            if is_reserved:
                writer = source.choice((ALIVE, DEAD, NO_WRITER))
                cache._records.reserve(slot, key, rank, shape, offset, (1, writer), origin)
            else:
                cache._records.publish(slot, key, rank, shape, offset, slot, origin, is_clean)
    cache._records.flush()
    files.die()
    return files


def harm(source: random.Random, data: bytearray, num_faults: int) -> None:
    """Flip bits, tear records, move all behind a place and cut the file's end off."""
    for _ in range(num_faults):
        start = PAGE_BYTES + source.randrange(NUM_SLOTS) * RECORD_BYTES
        if start + RECORD_BYTES > len(data):
            continue
        match source.randrange(8):
            case 0 | 1 | 2:
                data[start + source.randrange(RECORD_BYTES)] ^= 1 << source.randrange(8)
            case 3 | 4 | 5:
                num_bytes = source.randrange(RECORD_BYTES)
                other = PAGE_BYTES + source.randrange(NUM_SLOTS) * RECORD_BYTES
                data[start : start + num_bytes] = data[other : other + num_bytes]
            case 6:
                del data[start + source.randrange(RECORD_BYTES) : start + RECORD_BYTES]
            case _:
                del data[start + source.randrange(RECORD_BYTES) :]


def start(files: MemoryFiles) -> Cache:
    return open_cache(
        DIRECTORY,
        POOL_BYTES,
        256,
        policy="LRU",
        persist=False,
        has_tiers=True,
        files=files,
        clock=ManualClock(),
        entropy=SeededEntropy(),
    )


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 1 << 32), st.integers(0, 30), st.sampled_from((0.0, 0.02, 0.2, 0.6)), st.integers(0, 4))
def test_whatever_the_records_say_only_whole_chunks_that_overlap_nothing_are_found(
    seed: int, num_chunks: int, disorder: float, num_faults: int
) -> None:
    source = random.Random(seed)
    files = leave(source, num_chunks, disorder)
    node = files.nodes[f"{DIRECTORY}/records"]
    harm(source, node.data, num_faults)
    node.size_bytes = len(node.data)
    image = bytes(node.data[PAGE_BYTES:])
    visible, taken = expected(image)
    cache = start(files)
    event(f"{len(visible) * 100 // max(num_chunks, 1) // 25 * 25} % of the chunks are visible")
    cache.check_integrity()
    assert {key: cache._index.slots(entry) for key, entry in cache._index.by_key.items()} == visible
    assert {offset: cache._extents.piece_at(offset).size for offset in cache._extents.check()} == taken
    order = [cache._index.keys[entry] for entry in cache.policy.victims()]
    age, num_dirty = {}, 0
    for key, slots in visible.items():
        found = cache.lookup(1, key, lease=False)
        records = [record for slot in slots if (record := parse(image, slot))]
        assert found.offsets == [record.offset for record in records]
        assert found.checksums == [record.checksum for record in records]
        age[key] = max(record.sequence for record in records)
        num_dirty += not all(record.clean for record in records)
    assert order == sorted(visible, key=age.__getitem__)
    assert cache.usage().num_unwritten == num_dirty


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from((1, 31, 32, 33, 64, 96)), st.booleans(), st.booleans())
def test_a_full_table_comes_back_in_the_order_of_publication_with_origins_and_accounts(
    seed: int, num_slots: int, is_damaged: bool, has_gaps: bool
) -> None:
    source = random.Random(seed)
    files = MemoryFiles()
    cache = start(files)
    cache.pool.grow(READY_BYTES)
    places, slots = (source.sample(range(num_slots), num_slots) for _ in range(2))
    for number in range(num_slots):
        cache._records.back(slots[number])
        offset, origin = places[number] * MIB, ORIGINS[number % 3]
        cache._records.sequence += 1000 if has_gaps and source.random() < 0.1 else 0
        cache._records.publish(slots[number], bytes([number]) * 32, 0, (1, MIB), offset, 1, origin)
    cache._records.flush()
    files.die()
    node = files.nodes[f"{DIRECTORY}/records"]
    node.size_bytes = PAGE_BYTES + num_slots * RECORD_BYTES
    del node.data[node.size_bytes :]
    left = list(range(num_slots))
    if is_damaged:
        number = left.pop(source.randrange(num_slots))
        node.data[PAGE_BYTES + slots[number] * RECORD_BYTES + source.randrange(RECORD_BYTES)] ^= 1
    cache = start(files)
    index = cache._index
    entries = list(cache.policy.victims())
    assert [index.keys[entry][0] for entry in entries] == left
    for number, entry in zip(left, entries, strict=True):
        assert index.slots(entry) == [slots[number]]
        assert cache._room.origins.of(index.origin[slots[number]]) == ORIGINS[number % 3]
    counts = {ORIGINS[kind][:16]: MIB * sum(number % 3 == kind for number in left) for kind in range(3)}
    assert cache.quotas.tenant_bytes() == {tenant: num_bytes for tenant, num_bytes in counts.items() if num_bytes}
    cache.check_integrity()
