"""What was taken out because its bytes were wrong: counted, and the last of it named."""

from __future__ import annotations

from cache_worlds import MIB, keys, store
from memory_files import ManualClock

from lmcache.cache.origins import ORIGIN_BYTES
from lmcache.cache.quarantine import NAMED_MAX, Quarantine
from lmcache.cache.store import Cache
from lmcache.keys import TENANT_BYTES

ORIGIN = bytes(range(ORIGIN_BYTES))


def test_a_chunk_whose_check_failed_is_named_with_its_namespace_rank_and_age(cache: Cache, clock: ManualClock) -> None:
    reservation = cache.reserve(1, keys(7, 8), rank=0, world_size=1, extent_bytes=MIB, origin=ORIGIN)
    cache.commit(1, reservation.ticket, [7])
    assert cache.usage().quarantined == ()
    cache.release(2, cache.lookup(2, keys(7, 8)).lease, failed=[0])
    clock.seconds += 5.0
    (spoiled,) = cache.usage().quarantined
    assert spoiled.key == keys(7, 8)[:8]
    assert spoiled.namespace == ORIGIN[TENANT_BYTES : TENANT_BYTES + 8]
    assert (spoiled.rank, spoiled.age_s) == (0, 5.0)


def test_of_several_ranks_none_is_blamed(cache: Cache) -> None:
    for rank in range(2):
        reservation = cache.reserve(1, keys(0, 1), rank=rank, world_size=2, extent_bytes=MIB)
        cache.commit(1, reservation.ticket, [rank])
    cache.release(2, cache.lookup(2, keys(0, 1)).lease, failed=[0])
    assert [spoiled.rank for spoiled in cache.usage().quarantined] == [None]


def test_a_chunk_that_two_leases_complain_of_is_named_once(cache: Cache) -> None:
    store(cache, 0, 1)
    first, second = (cache.lookup(owner, keys(0, 1)) for owner in (1, 2))
    cache.release(1, first.lease, failed=[0])
    cache.release(2, second.lease, failed=[0])
    assert (cache.usage().num_quarantined, len(cache.usage().quarantined)) == (1, 1)


def test_all_are_counted_and_the_last_are_named_the_newest_first(clock: ManualClock) -> None:
    quarantine = Quarantine(clock)
    for number in range(NAMED_MAX + 3):
        quarantine.note(number.to_bytes(32, "little"), None, number)
        clock.seconds += 1.0
    latest = quarantine.latest()
    assert quarantine.count == NAMED_MAX + 3
    assert [spoiled.rank for spoiled in latest] == list(range(NAMED_MAX + 2, 2, -1))
    assert [spoiled.age_s for spoiled in latest] == [1.0 + number for number in range(NAMED_MAX)]
    assert {len(spoiled.key) for spoiled in latest} == {8}
