"""Chunks through the real copy engine: what one engine has stored, an engine with another layout retrieves."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_worlds import KEPT, ORDERS, Elements, Sizes, canonical, declared, format_of, part_of, vllm_views

from lmcache.layout import FORMATS, Format, Layout, layer_group
from lmcache.transfer.plan import CopyEngine, Plan
from lmcache.transfer.pool_map import PoolMap

POOL_BYTES = 1 << 20
CHUNK, HEADS, ELEMENTS = 24, 3, 8
FUSED = format_of("NL_X_NB_NH_BS_CS")
ATTENTION = [known for known in FORMATS if known.kind == "attention"]


@pytest.fixture(scope="module")
def pool() -> PoolMap:
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, POOL_BYTES)
    return PoolMap(fd, POOL_BYTES)


class Engine:
    """Memory of ``blocks`` blocks in one format, or in one of vLLM's physical orders, and its copy engine."""

    def __init__(self, found: Format, order: str, block_tokens: int, seed: int) -> None:
        self.sizes = Sizes(blocks=CHUNK // block_tokens + 3, tokens=block_tokens, heads=HEADS, elements=ELEMENTS)
        truth = self.sizes.truth(seed)
        self.found = found
        self.arrays = vllm_views(truth, order) if order else KEPT[found.name](truth)
        self.truth = truth
        self.copy = CopyEngine(Layout((layer_group([part_of(self.arrays, declared(found, self.sizes))]),)))

    def as_kept(self, truth: Elements, order: str) -> object:
        """How this engine's arrays look when they hold ``truth``."""
        return vllm_views(truth, order) if order else KEPT[self.found.name](truth)


def flat(arrays: object) -> list[bytes]:
    """Contents of nested arrays."""
    rows = arrays if isinstance(arrays, list) else [arrays]
    return [item for row in rows for item in (flat(row) if isinstance(row, list) else [row.tobytes()])]


@st.composite
def engines(draw: st.DrawFn) -> tuple[Format, str, int]:
    """A format, perhaps a physical order of it, a block size."""
    found = draw(st.sampled_from(ATTENTION))
    order = draw(st.sampled_from(("", *ORDERS))) if found is FUSED else ""
    return found, order, draw(st.sampled_from([1, 4, 6, 8, 12, 24]))


@settings(max_examples=80, deadline=None)
@given(engines(), engines(), st.randoms(use_true_random=False), st.integers(0, 5))
def test_a_chunk_of_one_engine_is_a_hit_in_another(
    pool: PoolMap, one: tuple[Format, str, int], two: tuple[Format, str, int], chance: random.Random, place: int
) -> None:
    writer, reader = Engine(*one, seed=1), Engine(*two, seed=2)
    tables = [chance.sample(range(e.sizes.blocks), CHUNK // e.sizes.tokens) for e in (writer, reader)]
    offset = place * 4096
    checksums = writer.copy.store(pool, Plan.of(CHUNK, tables[0], [offset], [7]), 1)
    tokens = canonical(FUSED, writer.truth, tables[0])
    assert bytes(pool.buffer[offset : offset + len(tokens)]) == tokens
    expected = int.from_bytes(checksums, "little")
    assert reader.copy.retrieve(pool, Plan.of(CHUNK, tables[1], [offset], [7]), [expected], 1) == []
    shape = (Sizes().layers, len(tables[1]), reader.sizes.tokens, HEADS, 2, ELEMENTS)
    reader.truth[:, tables[1]] = np.frombuffer(tokens, np.uint16).reshape(shape)
    assert flat(reader.arrays) == flat(reader.as_kept(reader.truth, two[1])), "only those blocks have changed"


@pytest.mark.parametrize("found", FORMATS, ids=lambda known: known.name)
def test_the_copy_engine_reads_every_format_as_the_formula_says(pool: PoolMap, found: Format) -> None:
    sizes = Sizes(elements=132, dtype="uint8") if found.kind == "indexer" else Sizes()
    truth = sizes.truth()
    layout = Layout((layer_group([part_of(KEPT[found.name](truth), declared(found, sizes))]),))
    blocks = [3, 0, 4]
    chunk = len(blocks) * sizes.tokens
    CopyEngine(layout).store(pool, Plan.of(chunk, blocks, [8192], [1]), 2)
    assert bytes(pool.buffer[8192 : 8192 + layout.extent_bytes(chunk)]) == canonical(found, truth, blocks)
