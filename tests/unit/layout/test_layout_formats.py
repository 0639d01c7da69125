"""Every format in real memory: what a walk through the planes reads is the truth, transposed by numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_worlds import (
    ITEM_BYTES,
    KEPT,
    ORDERS,
    Sizes,
    canonical,
    declared,
    extent,
    format_of,
    part_of,
    places,
    sizes_for,
    spec_of,
    vllm_views,
)

from lmcache.layout import CANONICAL, FORMATS, RAW, Format, Layout, find_format, layer_group, make_layout

BLOCKS = (3, 0, 4)
FUSED = format_of("NL_X_NB_NH_BS_CS")


def one_group(found: Format, sizes: Sizes, truth: np.ndarray, **changes: int | str) -> Layout:
    """The layout of an engine that keeps ``truth`` in this format."""
    return Layout((layer_group([part_of(KEPT[found.name](truth), declared(found, sizes, **changes))]),))


def test_every_format_has_an_oracle() -> None:
    assert set(KEPT) == {known.name for known in FORMATS}
    assert sorted(known.number for known in FORMATS if known.number >= 0) == list(range(19))


@pytest.mark.parametrize("found", FORMATS, ids=lambda known: known.name)
def test_an_extent_is_the_canonical_array(found: Format) -> None:
    sizes = sizes_for(found)
    truth = sizes.truth()
    layout = one_group(found, sizes, truth)
    assert extent(layout, BLOCKS) == canonical(found, truth, BLOCKS)
    assert layout.extent_bytes(len(BLOCKS) * sizes.tokens) == len(canonical(found, truth, BLOCKS))
    assert layout.groups[0].descriptions[0].form == CANONICAL


@pytest.mark.parametrize("found", FORMATS, ids=lambda known: known.name)
def test_a_format_is_found_again_from_what_was_registered(found: Format) -> None:
    sizes = sizes_for(found)
    part = part_of(KEPT[found.name](sizes.truth()), declared(found, sizes))
    assert find_format(part.declared, part.tensors) == (found, 1)


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
def test_every_element_type_is_canonical(dtype: str) -> None:
    sizes = sizes_for(FUSED, dtype=dtype)
    truth = sizes.truth()
    assert extent(one_group(FUSED, sizes, truth), BLOCKS) == canonical(FUSED, truth, BLOCKS)


@pytest.mark.parametrize("order", ORDERS)
def test_the_physical_order_of_one_allocation_does_not_show(order: str) -> None:
    sizes = Sizes()
    truth = sizes.truth()
    views = vllm_views(truth, order)
    group = layer_group([part_of(views, declared(FUSED, sizes))])
    assert extent(Layout((group,)), BLOCKS) == canonical(FUSED, truth, BLOCKS)
    everywhere = [place for address, length in places(group, range(5)) for place in range(address, address + length)]
    assert len(everywhere) == len(set(everywhere)) == truth.nbytes


ATTENTION = [known for known in FORMATS if known.kind == "attention"]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_same_tokens_are_the_same_bytes_whatever_the_format_and_the_block_size(data: st.DataObject) -> None:
    chunk, heads, elements = 24, data.draw(st.sampled_from([1, 3, 5])), data.draw(st.sampled_from([1, 4, 6]))
    tokens = Sizes(layers=2, blocks=1, tokens=chunk, heads=heads, elements=elements).truth(seed=1)
    seen = set()
    for _ in range(2):
        found = data.draw(st.sampled_from(ATTENTION))
        block = data.draw(st.sampled_from([1, 4, 6, 8, 12, 24]))
        sizes = Sizes(blocks=chunk // block + 3, tokens=block, heads=heads, elements=elements)
        table = data.draw(st.permutations(range(sizes.blocks)))[: chunk // block]
        truth = sizes.truth(seed=2)
        truth[:, table] = tokens.reshape(2, chunk // block, block, heads, 2, -1)
        if found is FUSED and data.draw(st.booleans()):
            arrays = vllm_views(truth, data.draw(st.sampled_from(ORDERS)))
        else:
            arrays = KEPT[found.name](truth)
        layout = Layout((layer_group([part_of(arrays, declared(found, sizes))]),))
        seen.add(extent(layout, table))
        assert layout.extent_bytes(chunk) == tokens.nbytes
    assert seen == {tokens.tobytes()}


def test_values_below_their_keys_are_a_negative_stride() -> None:
    found = format_of("NL_X_TWO_X_NB_BS_NH_HS")
    sizes = Sizes(layers=1)
    truth = sizes.truth()
    both = np.ascontiguousarray(truth[0].transpose(3, 0, 1, 2, 4)[::-1])  # V, then K
    layout = Layout((layer_group([part_of([[both[1], both[0]]], declared(found, sizes))]),))
    assert extent(layout, BLOCKS) == canonical(found, truth, BLOCKS)
    assert layout.groups[0].planes[0].dims[-1] == (2, both[0].ctypes.data - both[1].ctypes.data)
    assert layout.plane_table()[7] == 2**64 - both[0].nbytes


def test_heads_of_unlike_sizes_are_keys_then_values() -> None:
    sizes = Sizes()
    keys, values = sizes.truth(1)[..., 0, :], sizes.truth(2)[..., 0, :4]
    views = list(np.concatenate([keys, values], axis=-1))
    facts = declared(format_of("NL_X_NB_BS_NH_CS"), sizes, head_size_v=4, attention_backend="FLASH_ATTN_DIFFKV")
    layout = Layout((layer_group([part_of(views, facts)]),))
    chosen = list(BLOCKS)
    expected = b"".join(keys[layer, chosen].tobytes() + values[layer, chosen].tobytes() for layer in range(2))
    assert extent(layout, BLOCKS) == expected


@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize("form", [CANONICAL, RAW])
def test_blocks_that_a_kernel_has_cut_are_put_together(order: str, form: str) -> None:
    cut, whole = Sizes(blocks=10, tokens=4), Sizes(blocks=5, tokens=8)
    truth = cut.truth()
    facts = declared(FUSED, whole, device="cuda" if form == CANONICAL else "cpu")
    layout = Layout((layer_group([part_of(vllm_views(truth, order), facts)]),))
    joined = truth.reshape(2, 5, 8, *truth.shape[3:])
    if form == CANONICAL:
        assert extent(layout, BLOCKS) == canonical(FUSED, joined, BLOCKS)
    else:
        pieces = truth if order == "LBNHC" else truth.transpose(0, 1, 3, 2, 4, 5)
        rows = [2 * block + half for block in BLOCKS for half in (0, 1)]
        assert extent(layout, BLOCKS) == np.ascontiguousarray(pieces[:, rows]).tobytes()


def test_the_raw_form_is_whole_blocks_in_the_order_of_memory() -> None:
    sizes = Sizes()
    truth = sizes.truth()
    (group,) = make_layout([spec_of(view, "x", "float16") for view in vllm_views(truth, "LBNHC")], 5, 4).groups
    assert [(plane.dims, plane.run_bytes) for plane in group.planes] == [((), truth[0, 0].nbytes)] * 2
    assert extent(Layout((group,)), BLOCKS) == truth[:, list(BLOCKS)].tobytes()
    (group,) = make_layout([spec_of(view, "x", "float16") for view in vllm_views(truth, "BHLNC")], 5, 4).groups
    assert {len(plane.dims) for plane in group.planes} == {1}


def test_an_opaque_block_is_named_by_its_format_and_kept_raw() -> None:
    sizes = Sizes(blocks=1024, tokens=128, heads=4, elements=4, dtype="float32")
    facts = declared(FUSED, sizes, device="cpu", attention_backend="CPU_ATTN")
    group = layer_group([part_of(vllm_views(sizes.truth(), "LBHNC"), facts)])
    (said,) = group.descriptions
    assert (said.form, said.shape, said.concrete_shape) == (RAW, "NL x [NB, NH, BS, CS]", "2 x [1024, 4, 128, 8]")
    assert said.attention_backend == "vLLM non-MLA CPU attention"
    assert [plane.dims for plane in group.planes] == [(), ()]


def test_the_lines_of_the_seed_appear_byte_for_byte() -> None:
    found = format_of("NL_X_TWO_NB_BS_NH_HS")
    facts = declared(found, Sizes(80, 2048, 128, 8, 128))
    row = spec_of(np.empty((2, 1, 1, 8, 128), np.uint16), "layer", "float16")
    shape = (2, 2048, 128, 8, 128)
    strides = (2048 * 128 * 1024, 128 * 1024, 1024, 128, 1)
    layer_bytes = 2 * strides[0] * 2
    tensors = [
        replace(row, name=f"layer {n}", shape=shape, strides=strides, address=4096 + n * layer_bytes) for n in range(80)
    ]
    part = replace(part_of([np.empty(1)], facts), tensors=tensors)
    (said,) = layer_group([part]).descriptions
    assert said.attention_backend == "vLLM non-MLA flash attention"
    assert said.shape == "NL x [2, NB, BS, NH, HS]"
    assert said.concrete_shape == "80 x [2, 2048, 128, 8, 128]"
    assert (said.num_layers, said.num_heads * said.head_size, said.dtype) == (80, 1024, "torch.float16")
    assert said.is_mla is False


def test_the_page_has_every_format() -> None:
    page = Path(__file__).parents[3].joinpath("docs", "layouts.md").read_text(encoding="utf-8")
    for known in FORMATS:
        assert f"`{known.shape}`" in page, known.shape
