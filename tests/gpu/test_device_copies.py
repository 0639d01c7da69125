"""Copies by a real GPU are byte-exact, on every way between its memory and the pool."""

from __future__ import annotations

import itertools
import random

import pytest

torch = pytest.importorskip("torch")

from device_engine import ALWAYS_DIRECT, ALWAYS_STAGED, DeviceEngine, sheet  # noqa: E402

from lmcache.transfer import _native  # noqa: E402

NUM_PLANS = 100_000
PLANS_A_WORLD = 500
WAYS = [
    pytest.param({"direct_bytes_max": ALWAYS_DIRECT}, id="direct"),
    pytest.param({"direct_bytes_max": ALWAYS_STAGED, "staging_bytes": 1 << 20}, id="staged"),
    pytest.param({"direct_bytes_max": ALWAYS_DIRECT, "registered": False}, id="bounced"),
]
ORDERS = list(itertools.permutations(range(4)))


def check_both_ways(engine: DeviceEngine, rows: list[list[int]], stream: torch.cuda.Stream) -> None:
    """Store chunks, spoil the blocks, retrieve them: bytes and checksums are those of torch and of the host."""
    indices = list(range(len(rows)))
    expected = [engine.gathered(row) for row in rows]
    sums = engine.finish(engine.store(rows, indices, stream))
    for index, chunk in enumerate(expected):
        assert engine.extent(index).tobytes() == chunk
        assert sums[index] == _native.checksum(chunk, 0)
    for layer in engine.layers:
        layer.zero_()
    assert engine.finish(engine.retrieve(rows, indices, sums, stream)) == [1] * len(rows)
    assert [engine.gathered(row) for row in rows] == expected


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_in_memory_comes_back(order: tuple[int, ...], way: dict[str, int]) -> None:
    engine = DeviceEngine([sheet((40, 16, 2, 2, 128), order) for _ in range(3)], 4, 3, **way)
    check_both_ways(engine, engine.some_ids(random.Random(1), 3), torch.cuda.current_stream())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("run", [1, 2, 4, 8, 12, 16, 132, 240, 241, 1152, 16385])
def test_every_width_and_length_comes_back(run: int, way: dict[str, int]) -> None:
    engine = DeviceEngine([sheet((8, 1, 1, 1, run), (0, 1, 2, 3))], 1, 2, **way)
    check_both_ways(engine, engine.some_ids(random.Random(2), 2), torch.cuda.current_stream())


@pytest.mark.parametrize("way", WAYS)
def test_a_byte_that_changed_is_told_and_unnamed_blocks_stay(way: dict[str, int]) -> None:
    engine = DeviceEngine([sheet((8, 16, 2, 2, 128), (0, 1, 2, 3))], 4, 1, **way)
    stream = torch.cuda.current_stream()
    (good,) = engine.finish(engine.store([[0, 1, 2, 3]], [0], stream))
    before = engine.layers[0].clone()
    assert engine.finish(engine.retrieve([[-1, 5, -1, 7]], [0], [good], stream)) == [1]
    before[[5, 7]] = before[[1, 3]]
    assert torch.equal(engine.layers[0], before)
    engine.extent(0)[70] ^= 1
    assert engine.finish(engine.retrieve([[4, 5, 6, 7]], [0], [good], stream)) == [0]


@pytest.mark.parametrize("way", WAYS[:2])
def test_a_store_reads_what_its_stream_has_computed_and_not_what_comes_after(way: dict[str, int]) -> None:
    engine = DeviceEngine([sheet((64, 16, 8, 2, 256), (0, 1, 2, 3)) for _ in range(8)], 16, 4, **way)
    rows = engine.some_ids(random.Random(3), 4)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # cycles: the store is enqueued long before these values are there
        for layer in engine.layers:
            layer.fill_(7)
        ticket = engine.store(rows, range(4), stream)
        for layer in engine.layers:
            layer.fill_(8)
    engine.finish(ticket)
    assert all((engine.extent(index) == 7).all() for index in range(4))


def test_a_hundred_thousand_random_plans_come_back() -> None:
    rng = random.Random(4)
    stream = torch.cuda.current_stream()
    for world in range(NUM_PLANS // PLANS_A_WORLD):
        shape = (rng.randint(8, 24), rng.randint(1, 17), rng.randint(1, 4), rng.randint(1, 2))
        run = rng.choice((1, 2, 8, 16, 24, 64, 128, 132, 256, 576))
        layers = [sheet((*shape, run), rng.choice(ORDERS)) for _ in range(rng.randint(1, 3))]
        way = WAYS[world % len(WAYS)].values[0]
        engine = DeviceEngine(layers, rng.randint(1, 4), 2, **way)
        num_blocks, per_chunk = shape[0], engine.blocks_per_chunk
        for _ in range(PLANS_A_WORLD // 2):
            source, target = rng.sample(range(num_blocks), per_chunk), rng.sample(range(num_blocks), per_chunk)
            index = rng.randrange(2)
            expected = torch.cat([layer[source].flatten() for layer in layers])
            sums = engine.finish(engine.store([source], [index], stream))
            assert sums == [_native.checksum(engine.extent(index), 0)]
            assert engine.finish(engine.retrieve([target], [index], sums, stream)) == [1]
            assert torch.equal(torch.cat([layer[target].flatten() for layer in layers]), expected)
