from __future__ import annotations

import re

import pytest
from cache_worlds import DIRECTORY, MIB, ROOT, OpenCache, held, keys, store
from memory_files import Killed, MemoryFiles

from lmcache.cache.base import PAGE_BYTES
from lmcache.cache.opening import check_fits, open_pool, pool_directory, sweep_leftovers
from lmcache.cache.records import RECORD_BYTES, parse
from lmcache.errors import ConfigError, PoolError


def test_after_an_unclean_death_committed_chunks_are_found_again_in_the_same_places(
    open_small: OpenCache, files: MemoryFiles
) -> None:
    cache = open_small()
    store(cache, 0, 5)
    before = cache.lookup(1, keys(0, 5), lease=False)
    files.die()
    cache = open_small()
    assert cache.lookup(1, keys(0, 5), lease=False) == before
    assert cache.usage().num_adopted == 5


def test_adopted_chunks_go_in_the_order_of_their_publication(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small()
    store(cache, 0, 32)
    store(cache, 32, 64)
    files.die()
    cache = open_small()
    store(cache, 100, 104)
    assert held(cache, 0, 64) == [*range(28), *range(32, 64)]


@pytest.mark.parametrize("num_writes", range(4))
@pytest.mark.parametrize("torn_bytes", [0, 1, 60, 127, 128, 200, 256, 383, 384])
def test_killed_at_any_write_only_whole_committed_chunks_are_found(
    open_small: OpenCache, files: MemoryFiles, num_writes: int, torn_bytes: int
) -> None:
    cache = open_small()
    store(cache, 0, 62)
    files.kill_at(num_writes, torn_bytes)
    with pytest.raises(Killed):  # noqa: PT012
        for start in range(100, 130, 3):
            store(cache, start, start + 3)
            cache.clear()
    files.die()
    cache = open_small()
    for number in [*range(62), *range(100, 130)]:
        found = cache.lookup(1, keys(number, number + 1), lease=False)
        assert found.checksums == [number] * found.num_chunks


@pytest.mark.parametrize("num_writes", range(4))
@pytest.mark.parametrize("torn_bytes", [0, 5, 30])
def test_killed_at_any_write_of_its_first_start_the_next_start_works(
    open_small: OpenCache, files: MemoryFiles, num_writes: int, torn_bytes: int
) -> None:
    files.kill_at(num_writes, torn_bytes)
    try:
        store(open_small(), 0, 2)
    except Killed:
        files.die()
    else:
        pytest.fail("this start has fewer writes")
    store(open_small(), 0, 2)


@pytest.mark.parametrize("byte", range(0, RECORD_BYTES, 7))
def test_a_record_with_one_flipped_byte_is_no_record(open_small: OpenCache, files: MemoryFiles, byte: int) -> None:
    store(open_small(), 0, 3)
    files.die()
    files.nodes[f"{DIRECTORY}/records"].data[PAGE_BYTES + RECORD_BYTES + byte] ^= 0x40
    assert held(open_small(), 0, 3) == [0, 2]


def test_records_whose_extents_overlap_are_not_both_adopted(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small()
    store(cache, 0, 2)
    records = cache._records
    records.publish(1, keys(1, 2), 0, (1, MIB), 0, 1)
    records.flush()
    files.die()
    assert held(open_small(), 0, 2) == [1]


def test_a_record_outside_the_memory_that_exists_is_not_adopted(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small(256)
    store(cache, 0, 1)
    for offset in (255 * MIB, 256 * MIB, 1 << 62, 4096 + 512):
        cache._records.publish(1, keys(7, 8), 0, (1, MIB), offset, 1)
        cache._records.flush()
        files.die()
        cache = open_small(256)
        assert held(cache, 0, 8) == [0]


def test_a_few_small_chunks_far_apart_in_a_large_pool_are_adopted(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small(8192)
    cache.pool.grow(8192 * MIB)
    for number, offset in enumerate((0, 4096 * MIB, 8192 * MIB - PAGE_BYTES)):
        cache._records.publish(number, keys(number, number + 1), 0, (1, PAGE_BYTES), offset, number)
    cache._records.flush()
    files.die()
    cache = open_small(8192)
    assert held(cache, 0, 3) == [0, 1, 2]
    assert cache.usage().used_bytes == 3 * PAGE_BYTES


def test_a_chunk_that_lacks_a_rank_is_not_adopted(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small()
    for rank in range(2):
        reservation = cache.reserve(rank, keys(0, 2), rank=rank, world_size=2, extent_bytes=MIB)
        if rank == 0:
            first = reservation
    cache.commit(0, first.ticket, [1, 2])
    files.die()
    cache = open_small()
    assert held(cache, 0, 2) == []
    assert cache.usage().used_bytes == 0


def test_a_chunk_of_two_ranks_is_adopted_whole(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small()
    tickets = [cache.reserve(r, keys(0, 2), rank=r, world_size=2, extent_bytes=MIB).ticket for r in range(2)]
    for rank in (1, 0):
        cache.commit(rank, tickets[rank], [10 * rank, 10 * rank + 1])
    before = cache.lookup(1, keys(0, 2), lease=False)
    files.die()
    assert open_small().lookup(1, keys(0, 2), lease=False) == before


def test_an_extent_reserved_at_death_stays_aside_until_its_writer_is_gone(
    open_small: OpenCache, files: MemoryFiles
) -> None:
    cache = open_small()
    writers = [cache.pool.grant_descriptor() for _ in range(2)]
    for owner, (_, slot) in enumerate(writers):
        cache.attach_writer(owner, slot)
        cache.reserve(owner, keys(10 * owner, 10 * owner + 3), rank=0, world_size=1, extent_bytes=MIB)
    files.die()
    files.exit(writers[0][0])
    cache = open_small()
    assert cache.usage().set_aside_bytes == cache.usage().used_bytes == 3 * MIB
    assert list(store(cache, 100, 170)).count(1) == 61
    assert cache.pool.grant_descriptor()[1] not in (writers[1][1],), "a living writer's slot is not given to another"
    files.exit(writers[1][0])
    cache.sweep()
    assert cache.usage().set_aside_bytes == 0


def test_quarantined_chunks_are_not_found_again(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small()
    store(cache, 0, 3)
    cache.release(1, cache.lookup(1, keys(0, 3)).lease, [1])
    files.die()
    assert held(open_small(), 0, 3) == [0, 2]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("size", "it was made with --l1-size-gb 0.0625, this server has 0.078125"),
        ("chunk_tokens", "it was made with --chunk-size 256, this server has 128"),
        ("both", "it was made with --l1-size-gb 0.0625, .*; it was made with --chunk-size 256, this server has 128"),
        ("boot", "it is from before this machine was last started"),
        ("pool mode", "its file pool has mode 0660, not 0600"),
        ("pool link", "its file pool has 2 names, not 1"),
        ("pool kind", "its file pool is not a regular file"),
        ("pool gone", "its pool file is missing"),
        ("pool size", "its pool file has 4096 bytes, its records say 67108864"),
        ("records mode", "its file records has mode 0604, not 0600"),
        ("owner", "its file pool belongs to user 0, this server runs as 1000"),
        ("inode", r"its records are of pool file \d+, the one there is \d+"),
        ("version", "its records have version 1, this server has 2"),
        ("header", "its records have no header that can be read"),
        ("records gone", "its records have no header that can be read"),
    ],
)
@pytest.mark.parametrize("persist", [False, True])
def test_what_does_not_fit_in_every_respect_is_not_adopted_but_replaced_with_a_reason(
    open_small: OpenCache, files: MemoryFiles, change: str, reason: str, persist: bool
) -> None:
    store(open_small(persist=persist), 0, 3)
    files.die()
    pool, records = files.nodes[f"{DIRECTORY}/pool"], files.nodes[f"{DIRECTORY}/records"]
    match change:
        case "boot":
            files.boot = b"\2" * 16
        case "pool mode":
            pool.mode = 0o660
        case "pool link":
            pool.links = 2
        case "pool kind":
            pool.kind = "other"
        case "pool gone":
            files.remove(f"{DIRECTORY}/pool")
        case "pool size":
            pool.size_bytes = 4096
        case "records mode":
            records.mode = 0o604
        case "records gone":
            files.remove(f"{DIRECTORY}/records")
        case "owner":
            pool.owner = 0
        case "inode":
            pool.inode += 100
        case "version":
            records.data[8] = 1
        case "header":
            records.data[20] ^= 1
    size_bytes, chunk_tokens = (80 if change in ("size", "both") else 64) * MIB, 256
    if change in ("chunk_tokens", "both"):
        chunk_tokens = 128
    notes: list[str] = []
    opened, _ = open_pool(DIRECTORY, size_bytes, chunk_tokens, files, persist=persist, note=notes.append)
    opened.close(persist=True)
    assert len(notes) == 1
    assert re.fullmatch(f"the L1 that the server before left is not used and was removed: {reason}", notes[0])
    assert files.nodes[f"{DIRECTORY}/pool"] is not pool
    cache = open_small(size_bytes // MIB, chunk_tokens=chunk_tokens)
    assert held(cache, 0, 3) == []
    store(cache, 0, 3)


def test_nothing_is_noted_where_nothing_was_left_or_all_fits(files: MemoryFiles) -> None:
    notes: list[str] = []
    for _ in range(2):
        pool, _ = open_pool(DIRECTORY, 64 * MIB, 256, files, note=notes.append)
        pool.close(persist=True)
    assert notes == []


def test_a_size_that_is_no_whole_number_of_pages_is_the_same_at_the_next_start(files: MemoryFiles) -> None:
    notes: list[str] = []
    for extra_bytes in (5, 4000):
        pool, _ = open_pool(DIRECTORY, 64 * MIB + extra_bytes, 256, files, note=notes.append)
        pool.close(persist=True)
    assert notes == []


@pytest.mark.parametrize("name", ["5555", "a", "_-.x", "A" * 64])
def test_the_name_of_an_instance_is_that_of_its_directory(name: str) -> None:
    assert pool_directory(ROOT, name) == f"{ROOT}/{name}"


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a b", "ä", "a\n", "A" * 65, "a\0"])
def test_a_name_that_is_none_of_an_instance_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of an instance"):
        pool_directory(ROOT, name)


def test_after_a_clean_stop_that_writes_the_order_what_was_asked_for_last_stays_longest(
    open_small: OpenCache,
) -> None:
    cache = open_small(persist=True)
    store(cache, 0, 64)
    assert held(cache, 10, 12) == [10, 11]
    cache.close(persist=True)
    cache = open_small(persist=True)
    order = [int.from_bytes(cache._index.keys[entry], "big") for entry in cache.policy.victims()]
    assert order == [*range(63, 11, -1), *range(9, -1, -1), 10, 11]
    store(cache, 100, 160)
    assert held(cache, 0, 64) == [0, 1, 10, 11]


@pytest.mark.parametrize("byte", [0, 50, 100, 127])
def test_writing_the_order_makes_no_torn_record_whole(open_small: OpenCache, files: MemoryFiles, byte: int) -> None:
    cache = open_small()
    store(cache, 0, 3)
    files.nodes[f"{DIRECTORY}/records"].data[PAGE_BYTES + RECORD_BYTES + byte] ^= 0x40
    cache._records.write_order([0, 1, 2])
    files.die()
    assert held(open_small(), 0, 3) == [0, 2]


def test_killed_while_the_order_is_written_no_chunk_is_lost(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small()
    store(cache, 0, 60)
    files.kill_at(0, 40 * RECORD_BYTES)
    with pytest.raises(Killed):
        cache._records.write_order(range(60))
    files.die()
    assert held(open_small(), 0, 60) == list(range(60))


def test_chunks_marked_clean_are_not_told_as_dirty_at_the_next_start(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small()
    store(cache, 0, 4)
    slots = [cache._index.slots(cache._index.by_key[keys(number, number + 1)])[0] for number in (1, 2)]
    cache._records.mark_clean(slots)
    cache._records.flush()
    files.die()
    image = bytes(files.nodes[f"{DIRECTORY}/records"].data[PAGE_BYTES:])
    clean = [record.checksum for slot in range(4) if (record := parse(image, slot)) and record.clean]
    assert sorted(clean) == [1, 2]
    assert held(open_small(), 0, 4) == [0, 1, 2, 3]


def test_a_second_server_on_the_same_directory_is_refused(open_small: OpenCache) -> None:
    cache = open_small()
    with pytest.raises(PoolError, match="in use by another server"):
        open_small()
    store(cache, 0, 1)


@pytest.mark.parametrize(("mode", "owner"), [(0o755, 1000), (0o700, 0)])
def test_a_directory_that_others_can_enter_or_own_is_refused(
    open_small: OpenCache, files: MemoryFiles, mode: int, owner: int
) -> None:
    files.make_directory(ROOT)
    files.nodes[ROOT].mode, files.nodes[ROOT].owner = mode, owner
    with pytest.raises(PoolError, match="is not a directory of this user alone"):
        open_small()


def test_a_clean_stop_leaves_no_file_behind(open_small: OpenCache, files: MemoryFiles) -> None:
    cache = open_small()
    store(cache, 0, 3)
    cache.close(persist=False)
    assert files.nodes == {}
    assert files.free_bytes == files.total_bytes


def test_a_clean_stop_that_persists_is_found_again(open_small: OpenCache) -> None:
    cache = open_small(persist=True)
    store(cache, 0, 3)
    cache.close(persist=True)
    assert held(open_small(persist=True), 0, 3) == [0, 1, 2]


def test_a_start_on_another_port_removes_pools_of_dead_servers_but_not_of_living_or_persisting_ones(
    open_small: OpenCache, files: MemoryFiles
) -> None:
    for port, persist in (("1", False), ("2", True), ("4", False)):
        store(open_small(directory=f"{ROOT}/{port}", persist=persist), 0, 1)
    files.die()
    living = open_small(directory=f"{ROOT}/3")
    assert sweep_leftovers(ROOT, files, spare="4") == [f"{ROOT}/1"]
    assert files.names(ROOT) == ["2", "3", "4"]
    store(living, 0, 1)


def test_what_does_not_fit_is_refused_in_one_sentence_with_wanted_free_and_limit() -> None:
    with pytest.raises(ConfigError, match=r"--l1-size-gb 100 does not fit: 24\.00 GB are free of the 24\.00 GB"):
        check_fits(100 << 30, MemoryFiles(24 << 30))
    check_fits(24 << 30, MemoryFiles(24 << 30))


def test_a_full_file_system_ends_the_growth_and_the_pool_goes_on_with_what_it_has(open_small: OpenCache) -> None:
    cache = open_small(256)
    files = cache.pool.file._files  # type: ignore[attr-defined]
    cache.pool.grow(16 * MIB)
    files.free_bytes = 0
    assert cache.pool.grow(16 * MIB) == 0
    assert "no memory left" in (cache.usage().growth_stopped or "")
    assert cache.pool.is_complete
    store(cache, 0, 1)


def test_memory_that_does_not_exist_yet_is_not_granted_while_the_background_growth_is_at_it(
    open_small: OpenCache,
) -> None:
    cache = open_small(256)
    cache.pool.grow(2 * MIB)
    with cache.pool._growing:
        assert list(store(cache, 0, 3)) == [1, 1, 3]
    assert list(store(cache, 2, 3)) == [1]
    cache.pool.grow(256 * MIB)
    assert cache.pool.is_complete
    assert cache.usage().ready_bytes == 256 * MIB
