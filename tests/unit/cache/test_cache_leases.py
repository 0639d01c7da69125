from __future__ import annotations

from cache_worlds import MIB, OpenCache, held, keys, store
from memory_files import ManualClock

from lmcache.cache.base import Limits
from lmcache.cache.store import Cache


def test_a_lookup_answers_the_longest_held_prefix_and_stops_at_the_first_missing_chunk(cache: Cache) -> None:
    store(cache, 0, 3)
    store(cache, 4, 6)
    found = cache.lookup(1, keys(0, 6))
    assert (found.num_chunks, found.checksums) == (3, [0, 1, 2])
    assert len(set(found.offsets)) == 3
    assert found.lease > 0
    assert found.lease_s == 30.0


def test_a_lookup_that_finds_nothing_leases_nothing(cache: Cache) -> None:
    found = cache.lookup(1, keys(0, 4))
    assert (found.num_chunks, found.lease, found.lease_s, found.offsets) == (0, 0, 0.0, [])
    assert cache.usage().num_leases == 0


def test_chunks_that_the_engine_holds_itself_are_looked_up_but_not_leased(cache: Cache) -> None:
    store(cache, 0, 5)
    found = cache.lookup(1, keys(0, 5), first_chunk=3)
    assert (found.num_chunks, found.checksums) == (5, [3, 4])
    assert cache.usage().num_leased_entries == 2


def test_a_prefix_that_ends_before_the_first_chunk_asked_for_leases_nothing(cache: Cache) -> None:
    store(cache, 0, 2)
    found = cache.lookup(1, keys(0, 5), first_chunk=4)
    assert (found.num_chunks, found.lease, found.offsets) == (2, 0, [])


def test_a_lookup_without_a_lease_answers_in_detail_and_pins_nothing(cache: Cache) -> None:
    store(cache, 0, 2)
    found = cache.lookup(1, keys(0, 2), lease=False)
    assert (found.num_chunks, found.lease, found.checksums) == (2, 0, [0, 1])
    assert cache.usage().leased_bytes == 0


def test_a_lease_keeps_its_entry_from_eviction(cache: Cache) -> None:
    store(cache, 0, 4)
    found = cache.lookup(1, keys(0, 4))
    for start in range(100, 400, 10):
        store(cache, start, start + 10)
    assert held(cache, 0, 4) == [0, 1, 2, 3]
    assert cache.release(1, found.lease) == []
    for start in range(400, 700, 10):
        store(cache, start, start + 10)
    assert held(cache, 0, 4) == []


def test_a_lease_belongs_to_its_owner(cache: Cache) -> None:
    store(cache, 0, 1)
    lease = cache.lookup(1, keys(0, 1)).lease
    assert cache.release(2, lease) is None
    assert cache.release(1, lease) == []
    assert cache.release(1, lease) is None


def test_a_lease_ends_when_its_time_is_over(cache: Cache, clock: ManualClock) -> None:
    store(cache, 0, 1)
    lease = cache.lookup(1, keys(0, 1)).lease
    assert cache.sweep() == 30.0
    clock.seconds += 29.0
    assert cache.sweep() == 1.0
    clock.seconds += 1.0
    assert cache.sweep() is None
    assert cache.release(1, lease) is None
    assert cache.usage().num_expired_leases == 1


def test_an_idle_cache_asks_for_no_wakeup(cache: Cache) -> None:
    store(cache, 0, 3)
    assert cache.sweep() is None


def test_leased_bytes_are_capped_at_half_of_the_pool_and_the_answer_gets_shorter(cache: Cache) -> None:
    store(cache, 0, 60)
    found = cache.lookup(1, keys(0, 60))
    assert found.num_chunks == 32
    assert cache.usage().leased_bytes == 32 * MIB
    again = cache.lookup(2, keys(0, 60))
    assert again.num_chunks == 32, "what is leased already costs nothing more"
    other = cache.lookup(3, keys(40, 60))
    assert (other.num_chunks, other.lease) == (0, 0)
    assert cache.usage().num_shortened == 3


def test_the_number_of_leases_has_a_bound(open_small: OpenCache) -> None:
    cache = open_small(limits=Limits(leases_max=2))
    store(cache, 0, 1)
    leases = [cache.lookup(1, keys(0, 1)).lease for _ in range(3)]
    assert [bool(lease) for lease in leases] == [True, True, False]


def test_an_entry_stays_pinned_until_the_last_of_its_leases_ends(cache: Cache) -> None:
    store(cache, 0, 1)
    first, second = (cache.lookup(owner, keys(0, 1)).lease for owner in (1, 2))
    cache.release(1, first)
    assert cache.usage().num_leased_entries == 1
    cache.release(2, second)
    assert cache.usage().num_leased_entries == 0


def test_a_chunk_whose_check_failed_leaves_the_index_at_once_and_its_extent_is_free_after_the_last_lease(
    cache: Cache,
) -> None:
    store(cache, 0, 4)
    first, second = (cache.lookup(owner, keys(0, 4), first_chunk=1) for owner in (1, 2))
    assert cache.release(1, first.lease, failed=[1, 1, 77, -1]) == [keys(2, 3)]
    assert held(cache, 0, 4) == [0, 1, 3]
    assert cache.usage().num_quarantined == 1
    assert cache.usage().used_bytes == 4 * MIB
    cache.check_integrity()
    assert cache.release(2, second.lease, failed=[1]) == []
    assert cache.usage().num_quarantined == 1
    assert cache.usage().used_bytes == 3 * MIB


def test_a_quarantined_chunk_can_be_stored_again_while_a_lease_still_holds_the_old_bytes(cache: Cache) -> None:
    store(cache, 0, 1)
    first, second = cache.lookup(1, keys(0, 1)), cache.lookup(2, keys(0, 1))
    cache.release(1, first.lease, failed=[0])
    assert list(store(cache, 0, 1)) == [1]
    fresh = cache.lookup(3, keys(0, 1))
    assert fresh.offsets != second.offsets
    cache.check_integrity()


def test_the_end_of_an_owner_ends_its_leases_and_nobody_elses(cache: Cache) -> None:
    store(cache, 0, 2)
    cache.lookup(1, keys(0, 1))
    kept = cache.lookup(2, keys(1, 2)).lease
    cache.drop_owner(1)
    assert cache.usage().num_leases == 1
    assert cache.release(2, kept) == []


def test_clear_keeps_what_a_lease_or_a_reservation_holds(cache: Cache) -> None:
    store(cache, 0, 5)
    cache.lookup(1, keys(0, 2))
    cache.reserve(1, keys(10, 11), rank=0, world_size=1, extent_bytes=MIB)
    cleared = cache.clear()
    assert (cleared.num_entries, cleared.num_kept) == (3, 3)
    assert held(cache, 0, 5) == [0, 1]
