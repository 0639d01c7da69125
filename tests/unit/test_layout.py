"""The affine map of engine blocks, against an oracle that enumerates every byte."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.errors import LayoutError
from lmcache.layout import TensorSpec, make_layout

WORDS = {"B": 5, "H": 3, "N": 4, "C": 8}


def contiguous(shape: Sequence[int]) -> list[int]:
    """Strides of a C-ordered tensor, in elements."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


def layers_in(order: str, num_layers: int = 2, item_bytes: int = 2, address: int = 4096) -> list[TensorSpec]:
    """vLLM's per-layer views [B, H, N, C] of one allocation whose dimensions lie in ``order`` (such as "LBNHC")."""
    sizes = {**WORDS, "L": num_layers}
    strides = dict(zip(order, contiguous([sizes[word] for word in order]), strict=True))
    return [
        TensorSpec(
            f"layer {layer}",
            tuple(WORDS.values()),
            tuple(strides[word] for word in WORDS),
            item_bytes,
            address + layer * strides["L"] * item_bytes,
        )
        for layer in range(num_layers)
    ]


def bytes_of_block(tensors: Sequence[TensorSpec], block: int) -> set[int]:
    """Every address that belongs to a block, the slow way."""
    found: set[int] = set()
    for tensor in tensors:
        for index in itertools.product(*map(range, tensor.shape[1:])):
            element = block * tensor.strides[0] + sum(i * s for i, s in zip(index, tensor.strides[1:], strict=True))
            start = tensor.address + element * tensor.item_bytes
            found.update(range(start, start + tensor.item_bytes))
    return found


@given(st.permutations("LBHN"), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_segments_cover_each_block_exactly_whatever_the_physical_order(
    order: list[str], num_layers: int, item_bytes: int
) -> None:
    tensors = layers_in("".join(order) + "C", num_layers, item_bytes)
    layout = make_layout(tensors, WORDS["B"])
    for block in range(WORDS["B"]):
        starts = [(s.address + block * s.stride_bytes, s.length_bytes) for s in layout.segments]
        covered = [byte for start, length in starts for byte in range(start, start + length)]
        assert len(covered) == len(set(covered)) == layout.block_bytes
        assert set(covered) == bytes_of_block(tensors, block)


def test_a_contiguous_page_is_one_segment_a_layer() -> None:
    layout = make_layout(layers_in("LBHNC"), WORDS["B"])
    assert [s.length_bytes for s in layout.segments] == [3 * 4 * 8 * 2] * 2


def test_keys_and_values_in_front_of_the_blocks_are_two_segments() -> None:
    spec = TensorSpec("old", (2, 5, 4, 3, 8), tuple(contiguous((2, 5, 4, 3, 8))), 2, 64)
    layout = make_layout([spec], 5)
    assert len(layout.segments) == 2
    assert layout.block_bytes == 2 * 4 * 3 * 8 * 2


def test_a_tensor_under_two_names_counts_once() -> None:
    first, second = layers_in("LBHNC")
    twice = make_layout([first, second, first], WORDS["B"])
    assert twice == make_layout([first, second], WORDS["B"])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TensorSpec("t", (7, 4), (4, 1), 2, 64)], "expected 5 blocks"),
        ([TensorSpec("t", (5, 5, 4), (20, 4, 1), 2, 64)], "expected 5 blocks"),
        ([TensorSpec("t", (5, 4), (4, 0), 2, 64)], "expanded or reversed"),
        ([TensorSpec("t", (5, 4), (2, 1), 2, 64)], "blocks overlap"),
        ([TensorSpec("t", (5, 4), (4, 1), 2, 64), TensorSpec("u", (5, 4), (4, 1), 2, 68)], "overlap in memory"),
        ([TensorSpec("t", (5, 4), (8, 1), 2, 64), TensorSpec("u", (5, 4), (16, 1), 2, 72)], "different block strides"),
    ],
)
def test_what_is_not_understood_is_refused_and_shown(tensors: list[TensorSpec], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        make_layout(tensors, 5)
