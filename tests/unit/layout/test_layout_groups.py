"""Several groups, chunks of whole blocks, and memory that is shared or must not be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layout_worlds import KEPT, Sizes, declared, extent, format_of, part_of, places, spec_of, vllm_views

from lmcache.errors import LayoutError
from lmcache.layout import LayerGroup, Layout, Plane, TensorSpec, layer_group, make_layout, make_plane, raw_group

FUSED = format_of("NL_X_NB_NH_BS_CS")
INDEXER = format_of("NL_X_NB_ONE_BSV_BSS")


def test_groups_with_block_sizes_of_their_own_may_share_memory() -> None:
    memory = np.random.default_rng(5).integers(0, 256, 6 * 768, np.uint8)
    full = memory.view(np.uint16).reshape(6, 3, 4, 32)
    window = memory.view(np.uint16).reshape(6, 3, 8, 16)
    groups = [
        layer_group([part_of([full], declared(FUSED, Sizes(1, 6, 4, 3, 16)))]),
        layer_group([part_of([window], declared(FUSED, Sizes(1, 6, 8, 3, 8)))]),
    ]
    layout = Layout(tuple(groups))
    assert layout.group_table(8).tolist() == [1, 6, 2, 1, 6, 1]
    assert layout.blocks_per_chunk(8) == 3
    expected = full[[4, 1]].transpose(0, 2, 1, 3).tobytes() + window[[2]].transpose(0, 2, 1, 3).tobytes()
    assert extent(layout, (4, 1), (2,)) == expected
    assert layout.extent_bytes(8) == len(expected)


def test_a_chunk_is_whole_blocks_of_every_group() -> None:
    planes = (Plane(64, 32, (), 32),)
    layout = Layout((LayerGroup(planes, 4, 16), LayerGroup(planes, 4, 24)))
    assert layout.extent_bytes(96) == 32 * 6 + 32 * 4
    for ask in (layout.extent_bytes, layout.group_table, layout.blocks_per_chunk):
        with pytest.raises(LayoutError, match=r"256 tokens .* block of 16 and 24; .*--chunk-size 288$"):
            ask(256)
    with pytest.raises(LayoutError, match=r"--chunk-size 48$"):
        layout.extent_bytes(40)


def test_recurrent_state_is_one_opaque_block_a_chunk() -> None:
    sizes = Sizes()
    states = np.random.default_rng(1).integers(0, 256, (2, 5, 1, 1, 100), np.uint8)
    facts = declared(FUSED, sizes, kind="state", block_tokens=8, num_heads=1, dtype="uint8")
    state = layer_group([part_of(list(states), facts)])
    layout = Layout((make_layout([spec_of(states[0], "attention", "uint8")], 5, 4).groups[0], state))
    assert layout.group_table(16).tolist() == [1, 5, 4, 2, 5, 1]
    assert extent(layout, (0, 1, 2, 3), (4,)) == states[0, :4].tobytes() + states[:, 4].tobytes()
    assert [plane.run_bytes for plane in state.planes] == [100, 100]


def test_layers_of_several_kinds_share_one_list_of_blocks() -> None:
    latent = format_of("NL_X_NB_ONE_BS_HS")
    truth, entries = Sizes(elements=6).truth(), Sizes(elements=132, dtype="uint8").truth()
    group = layer_group(
        [
            part_of(KEPT[latent.name](truth), declared(latent, Sizes(elements=6))),
            part_of(KEPT[INDEXER.name](entries), declared(INDEXER, Sizes(elements=132, dtype="uint8"))),
        ]
    )
    assert [said.shape for said in group.descriptions] == ["NL x [NB, 1, BS, HS]", "NL x [NB, 1, BS, 132]"]
    latents, some = truth[:, [3, 1]][:, :, :, 0, 0], entries[:, [3, 1]][:, :, :, 0, 0]
    scales_apart = b"".join(layer[..., :128].tobytes() + layer[..., 128:].tobytes() for layer in some)
    assert extent(Layout((group,)), (3, 1)) == latents.tobytes() + scales_apart


def test_parts_with_other_blocks_are_no_group() -> None:
    one, other = (part_of(KEPT[FUSED.name](s.truth()), declared(FUSED, s)) for s in (Sizes(), Sizes(tokens=8)))
    with pytest.raises(LayoutError, match="blocks of different kinds"):
        layer_group([one, other])
    with pytest.raises(LayoutError, match="registered no KV tensor"):
        layer_group([])


def test_a_tensor_under_two_names_counts_once() -> None:
    first, second = vllm_views(Sizes().truth(), "LBHNC")
    specs = [spec_of(view, name, "float16") for name, view in (("a", first), ("b", second), ("again", first))]
    assert make_layout(specs, 5, 4) == make_layout(specs[:2], 5, 4)


def tensor(strides: tuple[int, ...], address: int = 64) -> TensorSpec:
    return TensorSpec(f"at {address}", (5, 4), strides, 2, address, "float16")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([tensor((2, 1))], "blocks overlap"),
        ([tensor((4, 1)), tensor((4, 1), 68)], "overlap in memory"),
        ([tensor((8, 1)), tensor((16, 1), 72)], "different block strides"),
        ([tensor((8, 1)), tensor((8, 1), 78)], "overlap in memory"),
    ],
)
def test_memory_that_is_named_twice_in_a_group_is_refused(tensors: list[TensorSpec], message: str) -> None:
    with pytest.raises(LayoutError, match=message) as refused:
        raw_group(tensors, 5, 16)
    assert all(str(one) in str(refused.value) for one in tensors)


def test_rows_of_a_table_have_nine_numbers() -> None:
    plane = make_plane(4096, 1 << 20, [(2, 1 << 10), (4, 64), (8, 8), (1, 3)], 8)
    assert plane == Plane(4096, 1 << 20, ((2, 1 << 10),), 256)
    assert plane.row() == (4096, 1 << 20, 1, 0, 1, 0, 2, 1 << 10, 256)
    with pytest.raises(LayoutError, match="at most 3 dims"):
        make_plane(64, 10000, [(2, 5000), (2, 1000), (2, 200), (2, 50)], 4)
    with pytest.raises(LayoutError, match="an address"):
        Plane(0, 4, (), 4)


@st.composite
def small_planes(draw: st.DrawFn) -> tuple[Plane, ...]:
    """Planes whose strides nest or do not, close enough to meet."""
    planes = []
    unit = draw(st.sampled_from([2, 3, 4]))
    block = draw(st.integers(4, 40))
    for _ in range(draw(st.integers(1, 3))):
        dims = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(-30, 60)), max_size=2))
        step = draw(st.sampled_from([block, block, block + unit]))
        planes.append(Plane(200 + draw(st.integers(0, 60)), step, tuple(dims), draw(st.integers(1, unit))))
    return tuple(planes)


@settings(max_examples=400, deadline=None)
@given(small_planes(), st.integers(1, 4))
def test_what_is_accepted_never_names_a_byte_twice(planes: tuple[Plane, ...], num_blocks: int) -> None:
    try:
        group = LayerGroup(planes, num_blocks, 16)
    except LayoutError:
        assume(False)
        return
    named = [byte for start, length in places(group, range(num_blocks)) for byte in range(start, start + length)]
    assert len(named) == len(set(named))


@settings(max_examples=200, deadline=None)
@given(st.permutations("LBHNC"), st.tuples(*[st.integers(1, 4)] * 4), st.integers(1, 3))
def test_views_of_one_allocation_are_always_accepted(order: list[str], sizes: tuple[int, ...], gap: int) -> None:
    counts = dict(zip("LBHN", sizes, strict=True)) | {"C": 2}
    strides: dict[str, int] = {}
    span = 2
    for word in reversed(order):
        strides[word] = span
        span = span * counts[word] + gap * 2
    dims = [(counts[word], strides[word]) for word in "NHC"]
    planes = [make_plane(64 + layer * strides["L"], strides["B"], dims, 2) for layer in range(counts["L"])]
    group = LayerGroup(tuple(planes), counts["B"], 16)
    assert group.block_bytes == 2 * counts["N"] * counts["H"] * counts["L"] * 2


def test_a_large_engine_is_checked_without_a_visit_to_every_fragment() -> None:
    heads, tokens, layers = 8, 16, 128
    strides = {"H": layers * tokens * 512, "L": tokens * 512, "N": 512}
    block = heads * strides["H"]
    planes = [
        make_plane(4096 + n * strides["L"], block, [(tokens, 512), (heads, strides["H"])], 512) for n in range(layers)
    ]
    group = LayerGroup(tuple(planes), 1 << 20, tokens)
    assert group.block_bytes == heads * tokens * layers * 512
    beside = [Plane(p.address + 256, p.block_stride, p.dims, 256) for p in planes[:1]]
    with pytest.raises(LayoutError, match="overlap in memory"):
        LayerGroup((*planes, *beside), 1 << 20, tokens)


def test_keys_and_values_of_many_layers_may_lie_anywhere() -> None:
    apart = itertools.cycle([1 << 30, 3 << 30, 2 << 30])
    planes = [make_plane(4096 + n * (1 << 20), 4096, [(2, next(apart))], 4096) for n in range(64)]
    assert len(LayerGroup(tuple(planes), 256, 16).planes) == 64
