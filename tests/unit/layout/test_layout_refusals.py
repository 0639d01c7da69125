"""What is not understood is refused at registration, with the tensor; what sizes leave open is settled by facts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from layout_worlds import KEPT, Sizes, canonical, declared, extent, format_of, part_of, spec_of

from lmcache.errors import LayoutError
from lmcache.layout import CANONICAL, RAW, Layout, Part, TensorSpec, find_format, layer_group, make_layout

FLASH, INFER = format_of("NL_X_TWO_NB_BS_NH_HS"), format_of("NL_X_NB_TWO_BS_NH_HS")
FUSED, FUSED_NHD = format_of("NL_X_NB_NH_BS_CS"), format_of("NL_X_NB_BS_NH_CS")
PAIRS, LISTS = format_of("NL_X_TWO_X_NB_BS_NH_HS"), format_of("TWO_X_NL_X_NB_BS_NH_HS")


def tensor(shape: tuple[int, ...], strides: tuple[int, ...], address: int = 64) -> TensorSpec:
    return TensorSpec("layer 0", shape, strides, 2, address, "float16")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor((7, 4), (4, 1))], "expected 5 blocks"),
        ([tensor((5, 5, 4), (20, 4, 1))], "expected 5 blocks"),
        ([tensor((5, 4), (4, 0))], "expanded or reversed"),
        ([tensor((5, 4), (4, -1))], "expanded or reversed"),
        ([tensor((), ())], "no dimensions"),
        ([tensor((5, 0), (4, 1))], "empty"),
    ],
)
def test_a_raw_tensor_that_is_not_understood_is_shown(tensors: list[TensorSpec], message: str) -> None:
    with pytest.raises(LayoutError, match=message) as refused:
        make_layout(tensors, 5, 16)
    assert str(tensors[0]) in str(refused.value)


def test_two_blocks_in_front_of_keys_and_values_are_told_apart_by_the_backend() -> None:
    sizes = Sizes(blocks=2)
    truth = sizes.truth()
    for found in (FLASH, INFER):
        part = part_of(KEPT[found.name](truth), declared(found, sizes))
        assert extent(Layout((layer_group([part]),)), (1, 0)) == canonical(found, truth, (1, 0))
    part = part_of(KEPT[FLASH.name](truth), declared(FLASH, sizes, attention_backend="TRITON_ATTN"))
    with pytest.raises(LayoutError) as refused:
        layer_group([part])
    assert "it could be NL x [2, NB, BS, NH, HS] or NL x [NB, 2, BS, NH, HS]" in str(refused.value)
    assert "layer 0: shape [2, 2, 4, 3, 8]" in str(refused.value)


def test_as_many_tokens_as_heads_are_told_apart_by_the_declared_order() -> None:
    sizes = Sizes(tokens=3)
    truth = sizes.truth()
    for found in (FUSED, FUSED_NHD):
        part = part_of(KEPT[found.name](truth), declared(found, sizes))
        assert extent(Layout((layer_group([part]),)), (1, 0)) == canonical(found, truth, (1, 0))
    part = part_of(KEPT[FUSED.name](truth), declared(FUSED, sizes, order=""))
    with pytest.raises(LayoutError, match=r"NL x \[NB, NH, BS, CS\] or NL x \[NB, BS, NH, CS\].*shape \[5, 3, 3, 16\]"):
        layer_group([part])


def test_formats_that_mean_the_same_bytes_need_no_decision() -> None:
    sizes = Sizes(tokens=1, heads=1)
    part = part_of(KEPT[FUSED.name](sizes.truth()), declared(FUSED, sizes, order=""))
    assert find_format(part.declared, part.tensors)[0] in (FUSED, FUSED_NHD)


@pytest.mark.parametrize(
    "changes",
    [{"num_heads": 7}, {"head_size": 4}, {"block_tokens": 32}, {"num_blocks": 9}, {"engine": "sglang"}],
)
def test_tensors_that_contradict_what_is_declared_are_refused(changes: dict[str, int | str]) -> None:
    facts = declared(FUSED, Sizes(), **changes)
    if "engine" in changes:
        facts = replace(facts, attention_backend="FA3")
    part = part_of(KEPT[FUSED.name](Sizes().truth()), facts)
    with pytest.raises(LayoutError, match=r"no format of .*layer 0: shape"):
        layer_group([part])


def test_a_list_of_the_wrong_length_is_no_pair() -> None:
    arrays = KEPT[PAIRS.name](Sizes().truth())
    arrays[1] = arrays[1][:1]  # type: ignore[index, call-overload]
    with pytest.raises(LayoutError, match="no format of vllm-ascend"):
        layer_group([part_of(arrays, declared(PAIRS, Sizes()))])


def test_keys_and_values_that_lie_differently_are_refused() -> None:
    sizes = Sizes(layers=1)
    ((key, value),) = KEPT[PAIRS.name](sizes.truth())  # type: ignore[misc]
    wide = np.zeros((*value.shape[:3], 16), np.uint16)[..., :8]
    with pytest.raises(LayoutError, match=r"K and V of a layer lie differently.*layer 0.0.*layer 0.1"):
        layer_group([part_of([[key, wide]], declared(PAIRS, sizes))])


def test_keys_where_values_are_expected_are_refused() -> None:
    sizes = Sizes(layers=1)
    ((key, value),) = KEPT[PAIRS.name](sizes.truth())  # type: ignore[misc]
    narrow = np.ascontiguousarray(value[..., :4])
    facts = declared(PAIRS, sizes, head_size_v=4)
    assert (
        extent(Layout((layer_group([part_of([[key, narrow]], facts)]),)), (2,))
        == key[2].tobytes() + narrow[2].tobytes()
    )
    with pytest.raises(LayoutError, match=r"expected heads of 8 in K and 4 in V: layer 0\.0"):
        layer_group([part_of([[narrow, key]], facts)])


def test_elements_that_are_not_side_by_side_are_refused() -> None:
    sizes = Sizes()
    views = [np.zeros((*array.shape, 2), np.uint16)[..., 0] for array in KEPT[FUSED.name](sizes.truth())]
    with pytest.raises(LayoutError, match="not side by side"):
        layer_group([part_of(views, declared(FUSED, sizes))])


def test_cut_blocks_with_heads_outside_and_keys_apart_are_refused_with_the_block_size_that_would_do() -> None:
    found, cut = format_of("NL_X_NB_TWO_NH_BS_HS"), Sizes(blocks=10, tokens=4)
    arrays = KEPT[found.name](cut.truth())
    with pytest.raises(LayoutError, match=r"blocks of 4 tokens, which are not cut: layer 0: shape"):
        layer_group([part_of(arrays, declared(found, Sizes(blocks=5, tokens=8)))])
    layer_group([part_of(arrays, declared(found, cut))])


def test_layers_that_are_not_alike_are_refused() -> None:
    specs = [spec_of(array, f"layer {n}", "float16") for n, array in enumerate(KEPT[FUSED.name](Sizes().truth()))]
    specs[1] = replace(specs[1], dtype="float32", item_bytes=4, name="odd")
    with pytest.raises(LayoutError, match="odd"):
        layer_group([Part(declared(FUSED, Sizes()), specs)])


def test_a_strange_element_type_or_scales_inside_a_block_mean_raw() -> None:
    assert declared(FUSED, Sizes(dtype="float8_e8m0fnu")).form == RAW
    assert declared(FUSED, Sizes(), quantization="int8_per_token_head").form == RAW
    assert declared(FUSED, Sizes(), attention_backend="TURBOQUANT").form == RAW
    assert declared(FUSED, Sizes(), device="hip").form == RAW
    assert declared(FUSED, Sizes(), kind="opaque").form == RAW


def test_an_unknown_backend_is_canonical_only_where_the_engine_says_what_a_block_is() -> None:
    unknown = declared(FUSED, Sizes(), attention_backend="")
    assert unknown.form == RAW
    assert replace(unknown, is_dense=True).form == CANONICAL
    assert replace(unknown, is_dense=True, device="cpu").form == RAW
    assert replace(unknown, is_dense=True, attention_backend="TURBOQUANT").form == RAW
    known = declared(FUSED, Sizes())
    assert (known.form, replace(known, is_dense=False).form) == (CANONICAL, RAW)


def test_the_identity_of_canonical_chunks_leaves_block_size_and_backend_out() -> None:
    one, other = declared(FUSED, Sizes()), declared(FLASH, Sizes(tokens=16, blocks=77))
    assert one.identity() == other.identity()
    cpu = replace(one, device="cpu", attention_backend="CPU_ATTN")
    assert cpu.identity() != one.identity()
    assert cpu.identity() != replace(cpu, block_tokens=16).identity()
    for changes in ({"dtype": "bfloat16"}, {"head_size": 16}, {"num_heads": 6}, {"kind": "component"}):
        assert replace(one, **changes).identity() != one.identity()  # type: ignore[arg-type]


def test_two_heads_where_keys_and_values_could_be_are_not_guessed_from_the_backend() -> None:
    sizes = Sizes(heads=2)
    found = format_of("NL_X_NB_NH_BS_TWO_HS")
    part = part_of(KEPT[found.name](sizes.truth()), declared(found, sizes, order="", attention_backend="FLASHINFER"))
    with pytest.raises(LayoutError, match=r"could be NL x \[NB, 2, BS, NH, HS\] or NL x \[NB, NH, BS, 2, HS\]"):
        layer_group([part])
    assert find_format(declared(found, sizes), part.tensors) == (found, 1)
