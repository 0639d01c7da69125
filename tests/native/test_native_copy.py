"""Store and retrieve against numpy: random segment tables, block orders, alignments, thread counts."""

from __future__ import annotations

import random

import native_worlds as worlds
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

# Lengths at which the engine takes another turn: classes of XXH3, cache lines, leaves.
EDGES = (1, 16, 64, 240, 241, 256, 1024, 4096, 16320, 16384, 16385, 32768, 65536)


@st.composite
def some_world(draw: st.DrawFn, each_block_once: bool = False) -> worlds.World:
    """A random plan; ``each_block_once`` as a retrieve needs it, then with blocks of -1 among the others."""
    lengths = draw(st.lists(st.sampled_from(EDGES) | st.integers(1, 40_000), min_size=1, max_size=4))
    num_blocks = draw(st.integers(1, 6))
    if each_block_once:
        order = draw(st.permutations(range(num_blocks)))
        per_chunk = draw(st.integers(1, num_blocks))
        hidden = draw(st.sets(st.integers(0, num_blocks - 1)))
        ids = [-1 if block in hidden else block for block in order]
        rows = [tuple(ids[at : at + per_chunk]) for at in range(0, num_blocks - per_chunk + 1, per_chunk)]
    else:
        block = st.integers(0, num_blocks - 1)
        per_chunk = draw(st.integers(1, 4))
        rows = draw(st.lists(st.tuples(*[block] * per_chunk), min_size=1, max_size=3))
    skew = draw(st.sampled_from((0, 0, 1, 8, 63)))
    rng = random.Random(draw(st.integers(0, 2**32)))
    return worlds.World(lengths, num_blocks, rows, skew, draw(st.integers(1, 4)), rng)


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
    world = worlds.World([65536], 2, [(0,), (1,)])
    sums = world.store()
    world.seeds[1] += np.uint64(1)
    assert world.retrieve(sums) == b"\1\0"


def test_blocks_of_minus_one_count_for_the_checksum_and_are_not_written() -> None:
    world = worlds.World([16384, 1000], 4, [(2, 0), (3, 1)], threads=2)
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
        world = worlds.World([300_000, 1_000_001], 3, [(2, 0, 1)], threads=threads)
        sums.append(world.store())
        assert world.extent(0).tobytes() == world.gathered(0)
    assert sums == [sums[0]] * 4


def test_an_empty_plan_copies_nothing() -> None:
    world = worlds.World([64], 1, [])
    assert world.store() == []
    assert world.retrieve([]) == b""
