"""What the cascade asks of a cache: chunks to write down, extents for what comes back, and whose it then is."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from cache_worlds import DIRECTORY, MIB, held, keys, store
from memory_files import ManualClock, MemoryFiles, SeededEntropy

from lmcache.cache import open_cache
from lmcache.cache.base import IntegrityError, Limits, State
from lmcache.cache.origins import ORIGIN_BYTES
from lmcache.cache.store import Cache
from lmcache.errors import LayoutError, PoolError
from lmcache.keys import TENANT_BYTES

CASCADE, ENGINE = 77, 1
TENANT = b"t" * TENANT_BYTES
ORIGIN = TENANT + bytes(ORIGIN_BYTES - TENANT_BYTES)
OpenTiered = Callable[..., Cache]


@pytest.fixture
def open_tiered(files: MemoryFiles, clock: ManualClock) -> Iterator[OpenTiered]:
    opened: list[Cache] = []

    def open_it(mib: int = 8, limits: Limits | None = None) -> Cache:
        cache = open_cache(
            DIRECTORY, mib * MIB, 256, policy="LRU", persist=False, files=files, clock=clock,
            entropy=SeededEntropy(), limits=limits, has_tiers=True,
        )  # fmt: skip
        opened.append(cache)
        return cache

    yield open_it
    for cache in opened:
        cache.check_integrity()


def take(cache: Cache, bytes_max: int = 1 << 40, *, from_old_end: bool = False) -> list[int]:
    """The numbers of the chunks that are handed out; what was leased for them is given back as written."""
    writings = cache.take_writes(CASCADE, bytes_max, from_old_end=from_old_end)
    for writing in writings:
        assert cache.written(CASCADE, writing.lease, kept=True)
    return [int.from_bytes(writing.key, "big") for writing in writings]


def test_what_becomes_visible_waits_to_be_written_oldest_first_and_once(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 3)
    assert cache.num_unwritten == 3
    # A reservation's last chunk becomes visible first; what waits is in the order of the prompt.
    assert take(cache) == [0, 1, 2]
    assert (cache.num_unwritten, take(cache)) == (0, [])


def test_as_many_are_handed_out_as_fit_and_one_more(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 4)
    assert take(cache, bytes_max=MIB + 1) == [0, 1]
    assert take(cache, bytes_max=0) == []
    assert cache.num_unwritten == 2


def test_a_writing_tells_all_that_an_object_needs(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    made = cache.reserve(ENGINE, keys(5, 6), rank=0, world_size=1, extent_bytes=MIB - 7, origin=ORIGIN)
    cache.commit(ENGINE, made.ticket, [99])
    (writing,) = cache.take_writes(CASCADE, MIB, from_old_end=False)
    assert (writing.key, writing.origin, writing.extent_bytes) == (keys(5, 6), ORIGIN, MIB - 7)
    assert (list(writing.offsets), list(writing.checksums)) == (made.offsets, [99])
    assert not cache.written(ENGINE, writing.lease, kept=True)  # not its lease
    assert cache.written(CASCADE, writing.lease, kept=True)


def test_what_is_being_written_cannot_be_evicted(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 8)
    cache.take_writes(CASCADE, 1, from_old_end=False)  # chunk 0 is leased, the pool is full
    store(cache, 100, 107)
    assert held(cache, 0, 8) == [0]


def test_what_the_tiers_did_not_keep_waits_for_another_turn(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 2)
    (writing,) = cache.take_writes(CASCADE, 1, from_old_end=False)
    assert cache.written(CASCADE, writing.lease, kept=False)
    assert take(cache) == [1, 0]


def test_what_a_cascade_had_been_given_waits_for_another_turn_when_it_is_gone_or_silent(
    open_tiered: OpenTiered, clock: ManualClock
) -> None:
    cache = open_tiered(limits=Limits(lease_s=5.0))
    store(cache, 0, 2)
    cache.take_writes(CASCADE, 1, from_old_end=False)
    cache.drop_owner(CASCADE)
    assert cache.num_unwritten == 2
    cache.take_writes(CASCADE, 1, from_old_end=False)
    clock.seconds += 6.0
    cache.sweep()
    assert cache.num_unwritten == 2


def test_a_chunk_whose_bytes_failed_while_it_was_written_is_not_tried_again(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 1)
    (writing,) = cache.take_writes(CASCADE, 1, from_old_end=False)
    found = cache.lookup(ENGINE, keys(0, 1))
    assert cache.release(ENGINE, found.lease, [0]) == [keys(0, 1)]
    assert cache.written(CASCADE, writing.lease, kept=False)
    assert (cache.num_unwritten, cache.usage().num_entries) == (0, 0)


def test_a_write_back_begins_when_l1_is_nearly_full_and_at_its_old_end(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 5)
    assert take(cache, from_old_end=True) == []
    store(cache, 5, 7)
    cache.lookup(ENGINE, keys(4, 5), lease=False)  # used, so it is the last to go
    # Of one prompt the later chunks go first.
    assert take(cache, bytes_max=2 * MIB - 1, from_old_end=True) == [3, 2]
    assert take(cache, from_old_end=True) == [1, 0, 6, 5]  # half of L1 at once; 3 and 2 are written already


def test_a_chunk_that_may_never_be_pinned_does_not_bar_the_way(open_tiered: OpenTiered) -> None:
    cache = open_tiered(limits=Limits(leased_share=0.25))
    made = cache.admit(CASCADE, keys(0, 1), world_size=3, extent_bytes=MIB)
    assert cache.publish(CASCADE, made.ticket, [7, 8, 9], origin=ORIGIN, extent_bytes=MIB, unwritten=True) == 1
    store(cache, 1, 2)
    assert take(cache) == [1]
    assert (cache.num_unwritten, cache.usage().num_lost, held(cache, 0, 2)) == (0, 1, [0, 1])


def test_as_much_is_pinned_at_once_as_leases_may_pin(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 6)
    assert len(cache.take_writes(CASCADE, 1 << 40, from_old_end=False)) == 4  # half of 8 MiB
    assert cache.num_unwritten == 2


# --- what comes back


def test_an_admitted_chunk_is_found_once_it_is_published_and_needs_no_writing(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    made = cache.admit(CASCADE, keys(1, 2), world_size=2, extent_bytes=MIB)
    assert (made.states, len(made.offsets)) == (bytes([State.GRANTED]), 2)
    assert cache.admit(CASCADE, keys(1, 2), world_size=2, extent_bytes=MIB).states == bytes([State.BUSY])
    assert held(cache, 1, 2) == []
    assert cache.publish(CASCADE, made.ticket, [7, 8], origin=ORIGIN, extent_bytes=MIB - 5) == 1
    found = cache.lookup(ENGINE, keys(1, 2))
    assert (found.offsets, found.checksums) == (made.offsets, [7, 8])
    assert cache.num_unwritten == 0
    assert cache.quotas.used_bytes(TENANT) == 2 * MIB
    assert cache.admit(CASCADE, keys(1, 2), world_size=2, extent_bytes=MIB).states == bytes([State.HELD])
    assert cache.release(ENGINE, found.lease) == []


def test_what_not_all_tiers_have_waits_for_the_others(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    made = cache.admit(CASCADE, keys(1, 2), world_size=1, extent_bytes=MIB)
    assert cache.publish(CASCADE, made.ticket, [7], origin=ORIGIN, extent_bytes=MIB, unwritten=True) == 1
    assert take(cache) == [1]


def test_a_chunk_for_which_not_all_ranks_have_room_gets_none(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 8)
    found = cache.lookup(ENGINE, keys(5, 8))  # three are pinned
    cache.lookup(ENGINE, keys(0, 1))
    made = cache.admit(CASCADE, keys(20, 21), world_size=6, extent_bytes=MIB)
    assert (made.ticket, made.states, list(made.offsets)) == (0, bytes([State.FULL]), [])
    assert cache.usage().num_refused_full == 1
    assert cache.release(ENGINE, found.lease) == []
    assert cache.usage().used_bytes <= 4 * MIB  # what was evicted for it is free, not lost


def test_a_tenant_without_room_gets_nothing_back_from_the_tiers(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    cache.quotas.set_limit(TENANT, MIB - 1)
    made = cache.admit(CASCADE, keys(1, 2), world_size=1, extent_bytes=MIB)
    assert cache.publish(CASCADE, made.ticket, [7], origin=ORIGIN, extent_bytes=MIB) == 0
    assert (cache.usage().used_bytes, held(cache, 1, 2)) == (0, [])


def test_a_tenant_makes_room_for_what_comes_back_among_its_own(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    cache.quotas.set_limit(TENANT, 2 * MIB)
    store(cache, 50, 51)
    for number in (0, 1):
        made = cache.reserve(ENGINE, keys(number, number + 1), rank=0, world_size=1, extent_bytes=MIB, origin=ORIGIN)
        cache.commit(ENGINE, made.ticket, [number])
    made = cache.admit(CASCADE, keys(2, 3), world_size=1, extent_bytes=MIB)
    assert cache.publish(CASCADE, made.ticket, [2], origin=ORIGIN, extent_bytes=MIB) == 1
    assert (held(cache, 0, 3), held(cache, 50, 51)) == ([1, 2], [50])


def test_a_header_that_tells_another_length_is_refused_and_the_reservation_stands(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    made = cache.admit(CASCADE, keys(1, 2), world_size=1, extent_bytes=MIB)
    with pytest.raises(ValueError, match="not a chunk of that length"):
        cache.publish(CASCADE, made.ticket, [7], origin=ORIGIN, extent_bytes=MIB // 2)
    assert cache.usage().num_reservations == 1
    assert cache.publish(ENGINE, made.ticket, [7], origin=ORIGIN, extent_bytes=MIB) is None  # not its ticket
    assert cache.abort(CASCADE, made.ticket)


def test_a_workers_reservation_cannot_be_published_as_a_tiers(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    made = cache.reserve(ENGINE, keys(1, 2), rank=0, world_size=1, extent_bytes=MIB)
    with pytest.raises(ValueError, match="from a tier"):
        cache.publish(ENGINE, made.ticket, [7], origin=ORIGIN, extent_bytes=MIB)
    assert cache.abort(ENGINE, made.ticket)


def test_ranks_that_cannot_be_are_refused(cache: Cache) -> None:
    with pytest.raises(ValueError, match="is not one of"):
        cache.reserve(ENGINE, keys(0, 1), rank=2, world_size=2, extent_bytes=MIB)
    with pytest.raises(ValueError, match="ranks"):
        cache.admit(CASCADE, keys(0, 1), world_size=0, extent_bytes=MIB)
    with pytest.raises(LayoutError):
        cache.reserve(ENGINE, keys(0, 1), rank=0, world_size=1, extent_bytes=65 * MIB)


# --- looked at without a touch, and given up


def test_peeking_tells_what_is_held_and_touches_nothing(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 1)
    store(cache, 1, 8)
    assert cache.peek(keys(0, 9)) == bytes([1] * 8 + [0])
    assert (cache.prefix_chunks(keys(0, 9)), cache.prefix_chunks(keys(8, 9))) == (8, 0)
    store(cache, 100, 101)
    assert held(cache, 0, 1) == []  # still the oldest, in spite of having been looked at


def test_only_an_owner_of_leases_is_said_to_hold_some(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 1)
    found = cache.lookup(ENGINE, keys(0, 1))
    assert (cache.holds_leases(ENGINE), cache.holds_leases(CASCADE)) == (True, False)
    cache.release(ENGINE, found.lease)
    assert not cache.holds_leases(ENGINE)


def test_what_is_cleared_before_the_tiers_had_it_is_lost_and_is_no_eviction(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 3)
    cache.take_writes(CASCADE, 1, from_old_end=False)
    cleared = cache.clear()
    assert (cleared.num_entries, cleared.num_kept) == (2, 1)
    assert (cache.usage().num_evicted, cache.usage().num_lost, cache.num_unwritten) == (0, 2, 0)


# --- the pool


def test_a_pool_that_was_cut_says_so(cache: Cache) -> None:
    assert cache.pool.damage() is None
    cache.pool.file.resize(4096)
    assert "was cut to 4096 of 67108864 bytes" in (cache.pool.damage() or "")


def test_a_file_system_without_memory_ends_the_growth_and_other_errors_do_not_pass(
    cache: Cache, files: MemoryFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache.pool.file, "allocate", broken)
    with pytest.raises(OSError, match="Input/output"):
        cache.pool.grow(MIB)
    monkeypatch.undo()
    files.free_bytes = 0
    assert cache.pool.grow(MIB) == 0
    assert "no memory left" in (cache.pool.growth_stopped or "")
    files.free_bytes = 1 << 40
    assert cache.pool.grow(MIB) == 0  # for good


def test_a_descriptor_that_cannot_be_locked_is_not_handed_out(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    class Unlockable:
        def hold_byte(self, _: int) -> None:
            raise OSError(37, "No locks available")

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(cache.pool.file, "reopen", Unlockable)
    with pytest.raises(OSError, match="No locks"):
        cache.pool.grant_descriptor()
    assert closed == [True]


def test_a_pool_whose_writer_slots_are_all_taken_hands_out_no_descriptor(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.pool, "writer_alive", lambda _: True)
    with pytest.raises(PoolError, match="too many writers"):
        cache.pool.grant_descriptor()


def test_books_that_contradict_each_other_are_found(open_tiered: OpenTiered) -> None:
    cache = open_tiered()
    store(cache, 0, 2)
    entry = cache._index.by_key[keys(0, 1)]
    slot = cache._index.first_slot(entry)
    spoils: list[tuple[Callable[[], None], str]] = [
        (lambda: cache._index.checksum.__setitem__(slot, 12345), "is of another chunk"),
        (lambda: cache._index.offset.__setitem__(slot, 4096), "names another extent"),
        (lambda: setattr(cache._leases, "bytes", 5), "leased bytes are miscounted"),
        (lambda: cache.quotas.add(TENANT, 5), "tenants are miscounted"),
    ]
    saved = (cache._index.checksum[slot], cache._index.offset[slot])
    for spoil, sentence in spoils:
        spoil()
        with pytest.raises(IntegrityError, match=sentence):
            cache.check_integrity()
        cache._index.checksum[slot], cache._index.offset[slot] = saved
        cache._leases.bytes = 0
    cache.quotas.subtract(TENANT, 5)
