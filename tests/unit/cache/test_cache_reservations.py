from __future__ import annotations

import pytest
from cache_worlds import MIB, OpenCache, held, keys, store
from memory_files import ManualClock, MemoryFiles

from lmcache.cache.base import NO_EXTENT, State
from lmcache.cache.store import Cache
from lmcache.errors import LayoutError

HELD, GRANTED, BUSY, FULL = State


def reserve(cache: Cache, owner: int, first: int, end: int, rank: int = 0, world_size: int = 1, mib: int = 1):  # type: ignore[no-untyped-def]
    return cache.reserve(owner, keys(first, end), rank=rank, world_size=world_size, extent_bytes=mib * MIB)


def test_a_chunk_is_visible_from_its_commit_on_and_not_before(cache: Cache) -> None:
    reservation = reserve(cache, 1, 0, 2)
    assert held(cache, 0, 2) == []
    assert cache.commit(1, reservation.ticket, [7, 8]) == 2
    found = cache.lookup(1, keys(0, 2))
    assert (found.offsets, found.checksums) == (reservation.offsets, [7, 8])


def test_a_reserve_says_of_each_key_whether_it_is_held_granted_or_busy(cache: Cache) -> None:
    store(cache, 0, 1)
    reserve(cache, 1, 1, 2)
    reservation = cache.reserve(2, keys(0, 3) + keys(2, 3), rank=0, world_size=1, extent_bytes=MIB)
    assert list(reservation.states) == [HELD, BUSY, GRANTED, BUSY]
    assert [offset == NO_EXTENT for offset in reservation.offsets] == [True, True, False, True]


def test_a_reserve_that_grants_nothing_issues_no_ticket(cache: Cache) -> None:
    store(cache, 0, 2)
    assert reserve(cache, 1, 0, 2).ticket == 0
    assert cache.usage().num_reservations == 0


def test_a_request_larger_than_the_pool_is_admitted_in_part_and_earlier_chunks_come_first(cache: Cache) -> None:
    reservation = reserve(cache, 1, 0, 70)
    assert list(reservation.states) == [GRANTED] * 64 + [FULL] * 6
    assert cache.usage().num_refused_full == 6


def test_after_the_first_refusal_all_later_chunks_are_refused_even_where_memory_came_free(cache: Cache) -> None:
    reserve(cache, 1, 0, 64)
    assert set(reserve(cache, 2, 100, 103).states) == {FULL}


def test_an_abort_gives_the_extents_back(cache: Cache) -> None:
    reservation = reserve(cache, 1, 0, 64)
    assert cache.abort(1, reservation.ticket)
    assert cache.usage().used_bytes == 0
    assert not cache.abort(1, reservation.ticket)
    assert cache.commit(1, reservation.ticket, [0] * 64) is None


def test_a_reservation_belongs_to_its_owner(cache: Cache) -> None:
    reservation = reserve(cache, 1, 0, 1)
    assert cache.commit(2, reservation.ticket, [1]) is None
    assert not cache.abort(2, reservation.ticket)
    assert cache.commit(1, reservation.ticket, [1]) == 1


def test_a_commit_with_a_wrong_number_of_checksums_is_an_error_and_changes_nothing(cache: Cache) -> None:
    reservation = reserve(cache, 1, 0, 2)
    with pytest.raises(ValueError, match="1 checksums for 2 extents"):
        cache.commit(1, reservation.ticket, [1])
    assert cache.commit(1, reservation.ticket, [1, 2]) == 2


def test_a_chunk_of_two_ranks_is_visible_when_both_have_committed(cache: Cache) -> None:
    first = reserve(cache, 1, 0, 2, rank=0, world_size=2)
    second = reserve(cache, 2, 0, 2, rank=1, world_size=2)
    assert cache.commit(2, second.ticket, [10, 11]) == 2
    assert held(cache, 0, 2) == []
    assert cache.commit(1, first.ticket, [0, 1]) == 2
    found = cache.lookup(3, keys(0, 2))
    assert found.checksums == [0, 10, 1, 11]
    assert found.offsets == [first.offsets[0], second.offsets[0], first.offsets[1], second.offsets[1]]


def test_a_rank_that_is_refused_dooms_the_chunk_and_the_other_ranks_extents_come_back(cache: Cache) -> None:
    first = reserve(cache, 1, 0, 2, rank=0, world_size=2)
    reserve(cache, 9, 100, 162)
    refused = reserve(cache, 2, 0, 2, rank=1, world_size=2)
    assert list(refused.states) == [FULL, FULL]
    assert cache.usage().used_bytes == 64 * MIB, "rank 0 may still be writing"
    assert cache.commit(1, first.ticket, [0, 1]) == 0
    assert cache.usage().used_bytes == 62 * MIB
    assert held(cache, 0, 2) == []


def test_a_rank_that_aborts_dooms_the_chunk_and_frees_what_others_committed(cache: Cache) -> None:
    first = reserve(cache, 1, 0, 1, rank=0, world_size=2)
    second = reserve(cache, 2, 0, 1, rank=1, world_size=2)
    cache.commit(1, first.ticket, [0])
    cache.abort(2, second.ticket)
    assert cache.usage().used_bytes == 0


def test_a_doomed_chunk_can_be_reserved_anew_while_a_rank_still_writes_the_old_one(cache: Cache) -> None:
    old = reserve(cache, 1, 0, 1, rank=0, world_size=2)
    cache.abort(2, reserve(cache, 2, 0, 1, rank=1, world_size=2).ticket)
    new = [reserve(cache, 3 + rank, 0, 1, rank=rank, world_size=2) for rank in range(2)]
    assert old.offsets != new[0].offsets
    for rank in range(2):
        cache.commit(3 + rank, new[rank].ticket, [20 + rank])
    assert cache.commit(1, old.ticket, [99]) == 0
    assert cache.lookup(5, keys(0, 1)).checksums == [20, 21]


def test_the_death_of_an_owner_discards_its_reservations_at_once(cache: Cache) -> None:
    first = reserve(cache, 1, 0, 1, rank=0, world_size=2)
    reserve(cache, 2, 0, 1, rank=1, world_size=2)
    cache.commit(1, first.ticket, [5])
    cache.drop_owner(2)
    assert cache.usage().used_bytes == 0
    assert cache.usage().num_reservations == 0


def test_a_chunk_that_the_other_rank_never_reserves_is_given_up_after_the_reservations_time(
    cache: Cache, clock: ManualClock
) -> None:
    first = reserve(cache, 1, 0, 1, rank=0, world_size=2)
    cache.commit(1, first.ticket, [5])
    assert cache.usage().num_reserved_entries == 1
    clock.seconds += cache.sweep() or 0
    assert cache.sweep() is None
    assert cache.usage().used_bytes == 0


def test_a_key_with_another_shape_is_busy(cache: Cache) -> None:
    reserve(cache, 1, 0, 1, rank=0, world_size=2)
    assert list(reserve(cache, 2, 0, 1, rank=1, world_size=3).states) == [BUSY]
    assert list(reserve(cache, 2, 0, 1, rank=1, world_size=2, mib=2).states) == [BUSY]


def test_a_rank_that_is_not_below_the_world_size_is_an_error(cache: Cache) -> None:
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        reserve(cache, 1, 0, 1, rank=2, world_size=2)


def test_an_expired_reservation_of_an_owner_that_cannot_write_is_free(cache: Cache, clock: ManualClock) -> None:
    reservation = reserve(cache, 1, 0, 1)
    clock.seconds += 30
    cache.sweep()
    assert cache.usage().used_bytes == 0
    assert cache.usage().num_expired_reservations == 1
    assert cache.commit(1, reservation.ticket, [1]) is None


@pytest.mark.parametrize("end", ["commit", "abort", "drop", "exit"])
def test_an_expired_reservation_of_a_living_writer_is_set_aside_until_it_is_done_or_gone(
    cache: Cache, clock: ManualClock, files: MemoryFiles, end: str
) -> None:
    descriptor, slot = cache.pool.grant_descriptor()
    cache.attach_writer(1, slot)
    reservation = reserve(cache, 1, 0, 3)
    clock.seconds += 30
    assert cache.sweep() == 1.0
    assert cache.usage().set_aside_bytes == cache.usage().used_bytes == 3 * MIB
    assert list(reserve(cache, 2, 0, 70).states).count(GRANTED) == 61
    cache.check_integrity()
    if end == "commit":
        assert cache.commit(1, reservation.ticket, [1, 2, 3]) is None
    elif end == "abort":
        assert not cache.abort(1, reservation.ticket)
    elif end == "drop":
        files.exit(descriptor)
        cache.drop_owner(1)
    else:
        files.exit(descriptor)
        clock.seconds += 1
        cache.sweep()
    assert cache.usage().set_aside_bytes == 0
    assert cache.usage().used_bytes == 61 * MIB


def test_what_a_process_reserved_that_let_go_of_us_but_lives_stays_aside_until_it_has_unmapped_the_pool(
    cache: Cache, clock: ManualClock, files: MemoryFiles
) -> None:
    descriptor, slot = cache.pool.grant_descriptor()
    cache.attach_writer(1, slot)
    reserve(cache, 1, 0, 3)
    cache.drop_owner(1)
    assert cache.usage().num_reservations == 0
    assert cache.usage().set_aside_bytes == cache.usage().used_bytes == 3 * MIB
    files.exit(descriptor)
    clock.seconds += cache.sweep() or 0
    cache.sweep()
    assert cache.usage().used_bytes == 0


def test_a_set_aside_writer_is_asked_for_once_a_second_however_often_the_cache_is_swept(
    cache: Cache, clock: ManualClock, files: MemoryFiles
) -> None:
    descriptor, slot = cache.pool.grant_descriptor()
    cache.attach_writer(1, slot)
    reserve(cache, 1, 0, 1)
    clock.seconds += 30
    cache.sweep()
    files.exit(descriptor)
    for _ in range(9):
        clock.seconds += 0.125
        cache.sweep()
    assert cache.usage().set_aside_bytes == 0


@pytest.mark.parametrize(("extent_bytes", "remedy"), [((64 << 20) + 1, "--chunk-size"), (65 << 20, "--chunk-size")])
def test_an_extent_larger_than_a_piece_is_refused_with_its_remedy(cache: Cache, extent_bytes: int, remedy: str) -> None:
    with pytest.raises(LayoutError, match=remedy):
        cache.reserve(1, keys(0, 1), rank=0, world_size=1, extent_bytes=extent_bytes)


def test_an_extent_larger_than_a_small_pool_is_refused_with_its_remedy(open_small: OpenCache) -> None:
    with pytest.raises(LayoutError, match="--l1-size-gb"):
        open_small(8).reserve(1, keys(0, 1), rank=0, world_size=1, extent_bytes=9 * MIB)
