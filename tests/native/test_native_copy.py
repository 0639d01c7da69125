"""Store and retrieve against numpy: random planes, layer groups, block orders, alignments, thread counts."""

from __future__ import annotations

import random

import native_worlds as worlds
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

# Lengths at which the engine takes another turn: classes of XXH3, cache lines, leaves.
EDGES = (1, 16, 64, 240, 241, 256, 1024, 4096, 16320, 16384, 16385, 32768, 65536)


@st.composite
def some_planes(draw: st.DrawFn, num_blocks: int, rng: random.Random) -> list[worlds.PlaneWorld]:
    """One layer group: long runs, or short ones in up to three dims."""
    planes = []
    for _ in range(draw(st.integers(1, 3))):
        run = draw(st.sampled_from(EDGES) | st.integers(1, 40_000))
        count = st.integers(1, 4 if run <= 4096 else 1)
        counts = draw(st.tuples(count, count, count))
        planes.append(worlds.PlaneWorld(num_blocks, run, counts, draw(st.sampled_from((0, 0, 1, 8, 63))), rng))
    return planes


@st.composite
def some_world(draw: st.DrawFn, each_block_once: bool = False) -> worlds.World:
    """A random plan; ``each_block_once`` as a retrieve needs it, then with blocks of -1 among the others."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    num_chunks = draw(st.integers(1, 3))
    groups, per_chunk, ids = [], [], []
    for _ in range(draw(st.integers(1, 2))):
        count = draw(st.integers(1, 3))
        num_blocks = num_chunks * count + draw(st.integers(0, 2))
        order = draw(st.permutations(range(num_blocks)))
        if each_block_once:
            hidden = draw(st.sets(st.integers(0, num_blocks - 1)))
            order = [-1 if block in hidden else block for block in order]
        else:
            order = draw(st.lists(st.sampled_from(order), min_size=num_chunks * count, max_size=num_chunks * count))
        groups.append(draw(some_planes(num_blocks, rng)))
        per_chunk.append(count)
        ids.append(order)
    rows = [
        tuple(
            block for order, count in zip(ids, per_chunk, strict=True) for block in order[at * count : (at + 1) * count]
        )
        for at in range(num_chunks)
    ]
    skew = draw(st.sampled_from((0, 0, 1, 8, 63)))
    return worlds.World(groups, rows, per_chunk, skew, draw(st.integers(1, 4)), rng)


@settings(deadline=None)
@given(world=some_world())
def test_a_store_gathers_the_blocks_and_touches_nothing_else(world: worlds.World) -> None:
    expected = world.pool.copy()
    for chunk, offset in enumerate(world.offsets.tolist()):
        expected[offset : offset + world.extent_bytes] = np.frombuffer(world.gathered(chunk), np.uint8)
    memory = [part.copy() for part in world.memory]
    sums = world.store()
    assert np.array_equal(world.pool, expected)
    assert all(np.array_equal(now, then) for now, then in zip(world.memory, memory, strict=True))
    assert sums == world.checksums()


@settings(deadline=None)
@given(world=some_world(each_block_once=True))
def test_a_retrieve_scatters_the_extents_and_touches_nothing_else(world: worlds.World) -> None:
    pool = world.pool.copy()
    before = [part.copy() for part in world.memory]
    for chunk in range(len(world.rows)):
        world.scatter(chunk)
    expected = [part.copy() for part in world.memory]
    for part, original in zip(world.memory, before, strict=True):
        part[:] = original
    assert world.retrieve(world.checksums()) == bytes([1] * len(world.rows))
    assert all(np.array_equal(now, then) for now, then in zip(world.memory, expected, strict=True))
    assert np.array_equal(world.pool, pool)


@settings(deadline=None)
@given(world=some_world(each_block_once=True), data=st.data())
def test_a_changed_byte_fails_exactly_its_chunk(world: worlds.World, data: st.DataObject) -> None:
    sums = world.checksums()
    victim = data.draw(st.integers(0, len(world.rows) - 1))
    world.extent(victim)[data.draw(st.integers(0, world.extent_bytes - 1))] ^= data.draw(st.integers(1, 255))
    assert list(world.retrieve(sums)) == [int(chunk != victim) for chunk in range(len(world.rows))]


def test_what_was_stored_under_another_seed_fails() -> None:
    world = worlds.World.of_runs([65536], 2, [(0,), (1,)])
    sums = world.store()
    world.seeds[1] += np.uint64(1)
    assert world.retrieve(sums) == b"\1\0"


def test_blocks_of_minus_one_count_for_the_checksum_and_are_not_written() -> None:
    world = worlds.World.of_runs([16384, 1000], 4, [(2, 0), (3, 1)], threads=2)
    sums = world.store()
    for part in world.memory:
        part[:] = 0
    world.blocks[:, 0] = -1
    assert world.retrieve(sums) == b"\1\1"
    assert not any(piece.any() for block in (2, 3) for piece in world.block(block))
    assert all(piece.any() for block in (0, 1) for piece in world.block(block))


def test_one_large_chunk_is_shared_by_all_threads_with_the_same_result() -> None:
    sums = []
    for threads in (1, 2, 7, 64):
        world = worlds.World.of_runs([300_000, 1_000_001], 3, [(2, 0, 1)], threads=threads)
        sums.append(world.store())
        assert world.extent(0).tobytes() == world.gathered(0)
    assert sums == [sums[0]] * 4


def test_an_empty_plan_copies_nothing() -> None:
    world = worlds.World.of_runs([64], 1, [])
    assert world.store() == []
    assert world.retrieve([]) == b""
