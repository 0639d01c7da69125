from __future__ import annotations

import pytest
from cache_worlds import MIB, OpenCache, held, keys, store
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_files import ManualClock, MemoryFiles, SeededEntropy

from lmcache.cache import open_cache
from lmcache.cache.base import PAGE_BYTES, State
from lmcache.cache.evict import make_policy
from lmcache.cache.evict.lru import LRU
from lmcache.cache.extents import Extents
from lmcache.cache.store import Cache
from lmcache.errors import ConfigError


def test_the_least_recently_used_chunk_goes_first(cache: Cache) -> None:
    for number in range(64):
        store(cache, number, number + 1)
    held(cache, 0, 1)
    store(cache, 100, 102)
    assert held(cache, 0, 64) == [0, *range(3, 64)]
    assert cache.usage().num_evicted == 2


def test_of_a_prompt_the_last_chunks_go_first(cache: Cache) -> None:
    store(cache, 0, 64)
    store(cache, 100, 104)
    assert cache.lookup(1, keys(0, 64), lease=False).num_chunks == 60
    store(cache, 200, 204)
    assert cache.lookup(1, keys(0, 64), lease=False).num_chunks == 60, "the lookup made it younger than 100 to 103"
    assert held(cache, 100, 104) == []


def test_storing_a_longer_prompt_does_not_evict_its_own_held_prefix(cache: Cache) -> None:
    store(cache, 0, 10)
    store(cache, 100, 154)
    store(cache, 0, 20)
    assert cache.lookup(1, keys(0, 20), lease=False).num_chunks == 20


def test_memory_of_a_class_that_nobody_uses_any_more_goes_to_another(open_small: OpenCache) -> None:
    cache = open_small(256)
    cache.pool.grow(256 * MIB)
    store(cache, 0, 256)
    for start in range(1000, 1100, 10):
        assert set(store(cache, start, start + 10, extent_bytes=3 * MIB)) == {State.GRANTED}
    assert len(held(cache, 1000, 1100)) >= 63


def test_another_class_gets_the_piece_whose_youngest_chunk_is_oldest_and_the_rest_stays(open_small: OpenCache) -> None:
    cache = open_small(256)
    cache.pool.grow(256 * MIB)
    store(cache, 0, 256)
    held(cache, 0, 64)
    held(cache, 128, 256)
    store(cache, 1000, 1001, extent_bytes=3 * MIB)
    assert held(cache, 0, 256) == [*range(64), *range(128, 256)]


def test_a_piece_with_a_leased_chunk_is_not_taken(open_small: OpenCache) -> None:
    cache = open_small(128)
    store(cache, 0, 128)
    cache.lookup(1, keys(0, 1))
    assert list(store(cache, 1000, 1001, extent_bytes=64 * MIB)) == [State.GRANTED]
    assert held(cache, 0, 128) == list(range(64))
    assert list(store(cache, 2000, 2002, extent_bytes=64 * MIB)) == [State.GRANTED, State.FULL]


def test_when_all_is_leased_or_reserved_a_store_is_refused_until_something_is_given_back(cache: Cache) -> None:
    store(cache, 0, 32)
    lease = cache.lookup(1, keys(0, 32)).lease
    ticket = cache.reserve(1, keys(100, 132), rank=0, world_size=1, extent_bytes=MIB).ticket
    assert list(store(cache, 200, 201)) == [State.FULL]
    assert list(store(cache, 200, 201)) == [State.FULL]
    cache.release(1, lease)
    assert list(store(cache, 200, 201)) == [State.GRANTED]
    cache.abort(1, ticket)


def test_the_piece_at_the_frontier_is_emptied_and_grown_when_no_other_can_serve(open_small: OpenCache) -> None:
    cache = open_small(72)
    store(cache, 0, 2, extent_bytes=4 * MIB)
    assert list(store(cache, 10, 11, extent_bytes=24 * MIB)) == [State.GRANTED]


def test_a_leased_chunk_at_the_old_end_is_passed_over_once_and_counts_as_used(cache: Cache) -> None:
    store(cache, 0, 64)
    lease = cache.lookup(1, keys(0, 4)).lease
    for start in range(100, 168, 4):
        store(cache, start, start + 4)
    cache.release(1, lease)
    store(cache, 300, 340)
    assert held(cache, 0, 4) == [0, 1, 2, 3]


def test_when_the_records_are_used_up_the_oldest_chunk_goes_whatever_memory_is_left(cache: Cache) -> None:
    for start in range(0, 1024, 64):
        store(cache, start, start + 64, extent_bytes=PAGE_BYTES)
    assert cache.usage().num_entries == cache.usage().num_slots == 1024
    assert set(store(cache, 2000, 2010, extent_bytes=PAGE_BYTES)) == {State.GRANTED}
    assert cache.usage().num_entries == 1024


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40 * MIB), st.integers(1, 8), st.integers(1, 3)), min_size=1, max_size=25),
    st.sampled_from([96, 128, 200]),
)
def test_a_sustained_store_into_a_full_unpinned_pool_is_never_refused(
    requests: list[tuple[int, int, int]], mib: int
) -> None:
    cache = open_cache(
        "/x/1", mib * MIB, 256, policy="lru", persist=False, files=MemoryFiles(), clock=ManualClock(),
        entropy=SeededEntropy(),
    )  # fmt: skip
    cache.pool.grow(mib * MIB)
    for number, (extent_bytes, num_chunks, world_size) in enumerate(requests):
        fit = mib // 64 * (64 * MIB // (-(-extent_bytes // PAGE_BYTES) * PAGE_BYTES))  # extents in whole pieces
        world_size = min(world_size, fit)
        num_chunks = min(num_chunks, fit // world_size)
        links = keys(number * 100, number * 100 + num_chunks)
        tickets = []
        for rank in range(world_size):
            reservation = cache.reserve(rank, links, rank=rank, world_size=world_size, extent_bytes=extent_bytes)
            assert set(reservation.states) == {State.GRANTED}
            tickets.append(reservation.ticket)
        for rank, ticket in enumerate(tickets):
            assert cache.commit(rank, ticket, [rank] * num_chunks) == num_chunks
        assert cache.lookup(0, links, lease=False).num_chunks == num_chunks
    cache.check_integrity()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("itr"), st.lists(st.integers(1, 12), max_size=6))))
def test_lru_keeps_the_order_of_an_ordered_dictionary(steps: list[tuple[str, list[int]]]) -> None:
    policy, model = LRU(), dict[int, None]()
    for verb, entries in steps:
        if verb == "i":
            fresh = [entry for entry in dict.fromkeys(entries) if entry not in model]
            policy.insert(fresh)
            model.update(dict.fromkeys(fresh))
        elif verb == "t":
            known = [entry for entry in entries if entry in model]
            policy.touch(known)
            for entry in known:
                del model[entry]
                model[entry] = None
        else:
            for entry in dict.fromkeys(entries):
                if entry in model:
                    policy.remove(entry)
                    del model[entry]
    assert list(policy.victims()) == list(model)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), max_size=80),
    st.lists(st.integers(0, 200), min_size=1, max_size=5).map(sorted),
)
def test_extents_never_overlap_never_straddle_a_piece_and_lie_in_ready_memory(
    steps: list[tuple[int, bool]], ready_pages: list[int]
) -> None:
    extents = Extents(150 * PAGE_BYTES, piece_bytes=16 * PAGE_BYTES)
    live: dict[int, int] = {}
    for number, (pages, frees) in enumerate(steps):
        ready = ready_pages[min(number * len(ready_pages) // len(steps), len(ready_pages) - 1)]
        extents.set_ready(min(ready, 150) * PAGE_BYTES)
        if frees and live:
            offset = sorted(live)[pages % len(live)]
            del live[offset]
            extents.free(offset)
        else:
            size = pages * PAGE_BYTES
            offset = extents.allocate(size, number)
            if offset is not None:
                assert offset // (16 * PAGE_BYTES) == (offset + size - 1) // (16 * PAGE_BYTES)
                assert offset + size <= min(ready, 150) * PAGE_BYTES
                assert all(offset + size <= other or other + live[other] <= offset for other in live)
                live[offset] = size
        assert set(extents.check()) == set(live)


def test_a_policy_is_found_by_name_whatever_the_case() -> None:
    assert make_policy("lru").name == make_policy("LRU").name == "LRU"


def test_an_unknown_policy_is_refused_and_the_known_ones_are_listed() -> None:
    with pytest.raises(ConfigError, match="unknown eviction policy 'MRU'; known: LRU"):
        make_policy("MRU")
