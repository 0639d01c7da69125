"""The sources of the CUDA kernels, compiled for the host, against numpy and the xxhash package."""

from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from emulated import NOT_WRITTEN, Engine, View, checksum, native, permutations, sheet
from hypothesis import given, settings
from hypothesis import strategies as st

ROUTES = [pytest.param({}, id="direct"), pytest.param({"direct_bytes_max": 0, "staging_bytes": 1 << 17}, id="staged")]


def attention(rng: random.Random, order: tuple[int, ...], block_tokens: int, layers: int = 2) -> list[View]:
    """Layers [block, token, head, K|V, element] of 24 blocks, two heads of 64 fp16 elements."""
    return [sheet(rng, (24 * 16 // block_tokens, block_tokens, 2, 2, 128), order) for _ in range(layers)]


@pytest.mark.parametrize("limits", ROUTES)
@pytest.mark.parametrize("order", permutations())
def test_every_order_in_memory_gives_the_canonical_bytes(order: tuple[int, ...], limits: dict[str, int]) -> None:
    engine = Engine([attention(random.Random(1), order, 16)], [4], **limits)
    ids = [7, 0, 23, 11]
    made = engine.store(ids, 1, 99)
    assert engine.extent(1).tobytes() == engine.gathered(ids)
    assert made == checksum(engine.gathered(ids), 99)


@pytest.mark.parametrize("limits", ROUTES)
def test_an_engine_with_other_blocks_and_another_order_reads_what_was_stored(limits: dict[str, int]) -> None:
    rng = random.Random(2)
    writer = Engine([attention(rng, (0, 1, 2, 3), 16)], [4], **limits)
    reader = Engine([attention(rng, (3, 0, 2, 1), 32)], [2], **limits)
    made = writer.store([5, 9, 1, 20], 0, 3)
    reader.extent(2)[:] = writer.extent(0)
    assert reader.retrieve([10, 4], 2, 3, made)
    assert reader.gathered([10, 4]) == writer.gathered([5, 9, 1, 20])


@pytest.mark.parametrize("limits", ROUTES)
def test_latent_attention_an_indexer_and_a_state_share_a_chunk(limits: dict[str, int]) -> None:
    rng = random.Random(3)
    latent = [sheet(rng, (10, 16, 1, 1, 576 * 2), (0, 1, 2, 3)) for _ in range(3)]
    indexer = [sheet(rng, (10, 16, 1, 1, 132), (0, 1, 2, 3)) for _ in range(3)]
    state = [sheet(rng, (5, 1, 1, 1, 12345), (0, 1, 2, 3))]
    engine = Engine([latent, indexer, state], [4, 4, 1], **limits)
    ids = [0, 3, 9, 2, 7, 8, 1, 0, 4]
    made = engine.store(ids, 0, 5)
    assert engine.extent(0).tobytes() == engine.gathered(ids)
    assert made == checksum(engine.gathered(ids), 5)


def test_a_block_that_is_not_named_stays_and_a_wrong_byte_is_told() -> None:
    engine = Engine([attention(random.Random(4), (0, 2, 1, 3), 16)], [4])
    engine.extent(0)[:] = np.frombuffer(random.Random(5).randbytes(engine.extent_bytes), np.uint8)
    expected = checksum(engine.extent(0).tobytes(), 8)
    before = [view.copy() for view in engine.groups[0]]
    assert engine.retrieve([NOT_WRITTEN, 6, NOT_WRITTEN, 2], 0, 8, expected)
    for view, old, layer in zip(engine.groups[0], before, np.split(engine.extent(0), 2), strict=True):
        old[[6, 2]] = layer.reshape(4, *view.shape[1:])[[1, 3]]
        assert np.array_equal(view, old)
    engine.extent(0)[70] ^= 1
    assert not engine.retrieve([1, 6, 3, 2], 0, 8, expected)


@pytest.mark.parametrize("length", [1, 8, 16, 17, 240, 241, 255, 256, 1023, 1088, 16383, 16384, 16385, 16640, 33000])
def test_checksums_of_every_class_of_length_are_those_of_xxhash(length: int) -> None:
    engine = Engine([[sheet(random.Random(length), (3, 1, 1, 1, length), (0, 1, 2, 3))]], [1])
    assert engine.store([2], 0, 1) == checksum(engine.gathered([2]), 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_planes_come_back_as_they_were_stored(data: st.DataObject) -> None:
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    groups = []
    for _ in range(data.draw(st.integers(1, 2))):
        num_blocks = data.draw(st.integers(4, 9))
        counts = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
        run = data.draw(st.sampled_from([1, 2, 6, 8, 12, 16, 64, 132, 576, 5000]))
        order = data.draw(st.sampled_from(permutations()))
        gap = data.draw(st.sampled_from([0, 0, 1, 16]))
        groups.append([sheet(rng, (num_blocks, *counts, run), order, gap) for _ in range(data.draw(st.integers(1, 3)))])
    per_chunk = [data.draw(st.integers(1, 4)) for _ in groups]
    limits = {"direct_bytes_max": data.draw(st.sampled_from([0, 1 << 30])), "staging_bytes": 1 << 16}
    engine = Engine(groups, per_chunk, **limits)
    ids = [i for group, n in zip(groups, per_chunk, strict=True) for i in rng.sample(range(group[0].shape[0]), n)]
    expected = engine.gathered(ids)
    made = engine.store(ids, 3, 11)
    assert engine.extent(3).tobytes() == expected
    assert made == checksum(expected, 11)
    for group in groups:
        for view in group:
            view[:] = 0
    assert engine.retrieve(ids, 3, 11, made)
    assert engine.gathered(ids) == expected


@pytest.mark.parametrize("order", permutations()[::5])
def test_the_host_and_the_gpu_make_the_same_extent_and_checksum(order: tuple[int, ...]) -> None:
    engine = Engine([attention(random.Random(9), order, 16)], [4])
    ids = [3, 20, 0, 8]
    made = engine.store(ids, 0, 42)
    tables = (engine.planes, engine.group_rows, array("q", ids), array("Q", [engine.room]), array("Q", [42]))
    by_host = native.store(engine.pool, *tables, 1)
    assert by_host == made.to_bytes(8, "little")
    assert np.array_equal(engine.extent(0), engine.extent(1))


def test_a_third_plan_of_two_is_told_to_come_back() -> None:
    engine = Engine([attention(random.Random(6), (0, 1, 2, 3), 16)], [4])
    tables = (array("q", [0, 1, 2, 3]), array("Q", [0]), array("Q", [0]))
    tickets = [engine.copier.store(*tables, engine.stream) for _ in range(2)]
    with pytest.raises(native.Busy, match="2 plans are under way already"):
        engine.copier.store(*tables, engine.stream)
    while native.emulation.step():
        pass
    assert all(engine.copier.finish(ticket) is not None for ticket in tickets)
    with pytest.raises(ValueError, match="no plan under way has the ticket"):
        engine.copier.finish(tickets[0])


@pytest.mark.parametrize("ids", [[0, 1, 2, 24], [0, 1, 2, -2], [0, 1, 2, NOT_WRITTEN], [0, 1, 2]])
def test_a_store_of_blocks_that_are_not_there_is_refused(ids: list[int]) -> None:
    engine = Engine([attention(random.Random(7), (0, 1, 2, 3), 16)], [4])
    with pytest.raises(ValueError, match="block"):
        engine.store(ids, 0, 0)


def test_an_extent_outside_the_pool_is_refused() -> None:
    engine = Engine([attention(random.Random(8), (0, 1, 2, 3), 16)], [4])
    with pytest.raises(ValueError, match="outside the pool"):
        engine.store([0, 1, 2, 3], 4, 0)
