"""``DeviceEngine`` over the emulated GPU: many chunks, both directions at once, a pool that becomes known piece by
piece."""

from __future__ import annotations

import os
import random
import tempfile
import threading
from array import array
from collections.abc import Sequence

import numpy as np
import pytest
from emulated import Bytes, View, checksum, native, sheet

from lmcache.layout import LayerGroup, Layout, make_plane
from lmcache.transfer import device, pool_map
from lmcache.transfer.device import DeviceEngine
from lmcache.transfer.plan import NOT_WRITTEN, Mark, Plan
from lmcache.transfer.pool_map import PoolMap

BLOCKS, BLOCK_TOKENS, CHUNK_TOKENS = 32, 16, 32
EXTENTS = 12


class Steps:
    """Streams of the emulated GPU; remembers which marks were followed where."""

    def __init__(self) -> None:
        self.followed: list[tuple[int, Mark]] = []
        self.marks = 0
        self._lock = threading.Lock()

    def make(self) -> int:
        return int(native.emulation.make_stream())

    def mark(self) -> Mark:
        self.marks += 1
        return self.marks

    def follow(self, stream: int, mark: Mark) -> None:
        self.followed.append((stream, mark))

    def pause(self) -> None:
        with self._lock:
            native.emulation.step()


class World:
    """Two layers, an engine over them, and a pool of EXTENTS extents."""

    def __init__(self) -> None:
        rng = random.Random(1)
        self.views: list[View] = [sheet(rng, (BLOCKS, BLOCK_TOKENS, 2, 2, 64), (0, 2, 1, 3)) for _ in range(2)]
        planes = [
            make_plane(v.ctypes.data, v.strides[0], list(zip(v.shape[1:4], v.strides[1:4], strict=True)), v.shape[4])
            for v in self.views
        ]
        self.layout = Layout((LayerGroup(tuple(planes), BLOCKS, BLOCK_TOKENS),))
        self.extent_bytes = self.layout.extent_bytes(CHUNK_TOKENS)
        self.room = -(-self.extent_bytes // 4096) * 4096
        self.steps = Steps()
        self.engine = DeviceEngine(self.layout, 0, self.steps)
        self.pool = self.new_pool()

    def new_pool(self) -> PoolMap:
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.truncate(EXTENTS * self.room)
            return PoolMap(os.dup(file.fileno()), EXTENTS * self.room)

    def plan(self, blocks: Sequence[int], extents: Sequence[int], after: Mark = None) -> Plan:
        return Plan.of(CHUNK_TOKENS, blocks, [at * self.room for at in extents], list(extents), after)

    def extent(self, at: int) -> Bytes:
        return np.frombuffer(self.pool.buffer, np.uint8)[at * self.room : at * self.room + self.extent_bytes]

    def gathered(self, blocks: Sequence[int]) -> bytes:
        return b"".join(view[list(blocks)].tobytes() for view in self.views)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(device, "_native", native)
    monkeypatch.setattr(device, "STAGING_BYTES", 1 << 16)  # some chunks a plan, so that jobs come in parts
    monkeypatch.setattr(device, "PLANS_MAX", 2)
    native.emulation.seed(1)
    return World()


def test_what_is_stored_in_many_parts_comes_back(world: World) -> None:
    ids = random.Random(2).sample(range(BLOCKS), 2 * EXTENTS)
    sums = array("Q", world.engine.store(world.pool, world.plan(ids, range(EXTENTS)), 1))
    for at in range(EXTENTS):
        right = world.gathered(ids[2 * at : 2 * at + 2])
        assert world.extent(at).tobytes() == right
        assert sums[at] == checksum(right, at)
    expected = [view.copy() for view in world.views]
    for view in world.views:
        view[ids] = 0
    assert world.engine.retrieve(world.pool, world.plan(ids, range(EXTENTS)), sums, 1) == []
    assert all(np.array_equal(view, then) for view, then in zip(world.views, expected, strict=True))


def test_a_wrong_byte_fails_its_chunk_alone_and_unnamed_blocks_stay(world: World) -> None:
    ids = list(range(2 * EXTENTS))
    sums = array("Q", world.engine.store(world.pool, world.plan(ids, range(EXTENTS)), 1))
    world.extent(7)[5] ^= 1
    named = [NOT_WRITTEN if block % 3 == 0 else block for block in ids]
    for view in world.views:
        view[:] = 0
    assert world.engine.retrieve(world.pool, world.plan(named, range(EXTENTS)), sums, 1) == [7]
    assert not any(view[block].any() for view in world.views for block in ids if block % 3 == 0)


def test_a_pool_becomes_known_piece_by_piece_and_copies_work_all_the_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_map, "POPULATE_STEP_BYTES", 4 * world.room)
    ids = list(range(2 * EXTENTS))
    has_more = True
    while has_more:
        sums = array("Q", world.engine.store(world.pool, world.plan(ids, range(EXTENTS)), 1))
        assert world.engine.retrieve(world.pool, world.plan(ids, range(EXTENTS)), sums, 1) == []
        has_more = world.engine.prepare(world.pool, world.pool.size_bytes, CHUNK_TOKENS)
    assert world.pool.populated_bytes == world.pool.size_bytes
    sums = array("Q", world.engine.store(world.pool, world.plan(ids, range(EXTENTS)), 1))
    assert [checksum(world.gathered(ids[2 * at : 2 * at + 2]), at) for at in range(EXTENTS)] == list(sums)


def test_another_server_brings_another_pool(world: World) -> None:
    ids = [3, 1]
    first = world.engine.store(world.pool, world.plan(ids, [0]), 1)
    world.pool = world.new_pool()
    assert world.engine.store(world.pool, world.plan(ids, [0]), 1) == first
    assert world.extent(0).tobytes() == world.gathered(ids)


def test_each_direction_follows_the_marks_of_its_jobs(world: World) -> None:
    one, two = world.engine.mark(), world.engine.mark()
    sums = array("Q", world.engine.store(world.pool, world.plan([1, 2], [0], one), 1))
    world.engine.retrieve(world.pool, world.plan([1, 2], [0], two), sums, 1)
    (store_stream, first), (load_stream, second) = world.steps.followed
    assert store_stream != load_stream
    assert (first, second) == (one, two)


def test_two_threads_share_the_device(world: World) -> None:
    half = EXTENTS // 2
    ids = list(range(2 * EXTENTS))
    sums = array("Q", world.engine.store(world.pool, world.plan(ids, range(EXTENTS)), 1))
    failed: list[list[int]] = []

    def load() -> None:
        for _ in range(5):
            plan = world.plan(ids[: 2 * half], range(half))
            failed.append(world.engine.retrieve(world.pool, plan, sums[:half], 1))

    loading = threading.Thread(target=load)
    loading.start()
    stored = [world.engine.store(world.pool, world.plan(ids[2 * half :], range(half, EXTENTS)), 1) for _ in range(5)]
    loading.join()
    assert failed == [[]] * 5
    assert stored == [sums[half:].tobytes()] * 5


def test_a_plan_that_does_not_fit_is_refused_and_the_next_one_is_carried_out(world: World) -> None:
    with pytest.raises(ValueError, match=f"block id {BLOCKS}"):
        world.engine.store(world.pool, world.plan([0, BLOCKS], [0]), 1)
    assert len(world.engine.store(world.pool, world.plan([0, 1], [0]), 1)) == 8
