"""KV whose every element is known, kept in real memory in each of the formats; and the slow way through a layout."""

from __future__ import annotations

import ctypes
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lmcache.layout import FORMATS, Declared, Format, LayerGroup, Layout, Part, TensorSpec

Elements = NDArray[np.generic]
Nested = list[Elements] | list[list[Elements]]

ORDERS = ("LBHNC", "LBNHC", "LHBNC", "BLHNC", "BLNHC", "BHLNC")
STORED_AS = {1: np.uint8, 2: np.uint16, 4: np.uint32}
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint8": 1, "int8": 1, "float32": 4}


@dataclass(frozen=True)
class Sizes:
    """Of one truth: an array [layers, blocks, tokens, heads, 2, elements]."""

    layers: int = 2
    blocks: int = 5
    tokens: int = 4
    heads: int = 3
    elements: int = 8
    dtype: str = "float16"

    def truth(self, seed: int = 0) -> Elements:
        """Random elements; the last axis is K's or V's."""
        item = ITEM_BYTES[self.dtype]
        shape = (self.layers, self.blocks, self.tokens, self.heads, 2, self.elements * item)
        return np.random.default_rng(seed).integers(0, 256, shape, np.uint8).view(STORED_AS[item])


def _each(truth: Elements, axes: tuple[int, ...]) -> Nested:
    """One array a layer; ``axes`` of [blocks, tokens, heads, 2, elements]."""
    return [np.ascontiguousarray(layer.transpose(axes)) for layer in truth]


def _fused(truth: Elements, axes: tuple[int, ...]) -> Nested:
    """As _each, K and V of a head as one last axis."""
    return [array.reshape(*array.shape[:3], -1) for array in _each(truth, axes)]


def _apart(truth: Elements, axes: tuple[int, ...]) -> list[list[Elements]]:
    """[K, V] of each layer; ``axes`` of [blocks, tokens, heads, elements]."""
    return [[np.ascontiguousarray(layer[:, :, :, kv].transpose(axes)) for kv in (0, 1)] for layer in truth]


def _paged(truth: Elements, axes: tuple[int, ...]) -> list[list[Elements]]:
    """As _apart, blocks and tokens as one axis."""
    return [[array.reshape(-1, *array.shape[2:]) for array in pair] for pair in _apart(truth, axes)]


def _turned(layers: list[list[Elements]]) -> list[list[Elements]]:
    return [list(one) for one in zip(*layers, strict=True)]


def _indexer(truth: Elements) -> list[Elements]:
    """Blocks of values then scales: 132 bytes a token, taken from the truth's elements."""
    tokens = truth[:, :, :, 0, 0, :132]
    pages = []
    for layer in tokens:
        values, scales = layer[:, :, :128], layer[:, :, 128:]
        page = np.concatenate([values.reshape(len(layer), -1), scales.reshape(len(layer), -1)], axis=1)
        pages.append(np.ascontiguousarray(page).reshape(layer.shape))
    return pages


KEPT: dict[str, Callable[[Elements], Nested]] = {
    "NB_NL_TWO_BS_NH_HS": lambda t: [np.ascontiguousarray(t.transpose(1, 0, 4, 2, 3, 5))],
    "NL_X_TWO_NB_BS_NH_HS": lambda t: _each(t, (3, 0, 1, 2, 4)),
    "NL_X_NB_TWO_BS_NH_HS": lambda t: _each(t, (0, 3, 1, 2, 4)),
    "NL_X_NB_BS_HS": lambda t: [np.ascontiguousarray(layer[:, :, 0, 0]) for layer in t],
    "TWO_X_NL_X_NBBS_NH_HS": lambda t: _turned(_paged(t, (0, 1, 2, 3))),
    "NL_X_NBBS_ONE_HS": lambda t: [np.ascontiguousarray(layer[:, :, :1, 0]).reshape(-1, 1, t.shape[-1]) for layer in t],
    "NL_X_TWO_NB_NH_BS_HS": lambda t: _each(t, (3, 0, 2, 1, 4)),
    "NL_X_NB_TWO_NH_BS_HS": lambda t: _each(t, (0, 3, 2, 1, 4)),
    "NB_NL_TWO_NH_BS_HS": lambda t: [np.ascontiguousarray(t.transpose(1, 0, 4, 3, 2, 5))],
    "TWO_X_NL_X_NB_BS_NH_HS": lambda t: _turned(_apart(t, (0, 1, 2, 3))),
    "NL_X_NB_NH_BS_TWO_HS": lambda t: _each(t, (0, 2, 1, 3, 4)),
    "NL_X_NB_BS_NH_TWO_HS": lambda t: _each(t, (0, 1, 2, 3, 4)),
    "NL_X_NB_NH_BS_CS": lambda t: _fused(t, (0, 2, 1, 3, 4)),
    "NL_X_NB_BS_NH_CS": lambda t: _fused(t, (0, 1, 2, 3, 4)),
    "NL_X_NB_BSV_BSS": _indexer,
    "NL_X_TWO_NB_NH_ONE_BS_HS": lambda t: [np.expand_dims(array, 3) for array in _each(t, (3, 0, 2, 1, 4))],
    "NL_X_TWO_X_NB_BS_NH_HS": lambda t: _apart(t, (0, 1, 2, 3)),
    "NL_X_NP_X_NB_BS_ONE_HS": lambda t: [
        [np.ascontiguousarray(layer[:, :, :1, 0]), np.ascontiguousarray(layer[:, :, :1, 1, :4])] for layer in t
    ],
    "NL_X_NB_BS_NH_HS": lambda t: [np.ascontiguousarray(layer[:, :, :, 0]) for layer in t],
    "NL_X_NB_ONE_BS_HS": lambda t: [np.ascontiguousarray(layer[:, :, 0, 0])[:, None] for layer in t],
    "NL_X_NB_ONE_BSV_BSS": lambda t: [page[:, None] for page in _indexer(t)],
}
"""The format's arrays, made from a truth by transposing it."""


def canonical(found: Format, truth: Elements, blocks: Sequence[int]) -> bytes:
    """What an extent of these blocks has to be."""
    some = truth[:, list(blocks)]
    if found.kind == "attention":
        return some.tobytes()
    if found.kind == "component":
        return some[:, :, :, :, 0].tobytes()
    if found.kind == "indexer":
        entries = some[:, :, :, 0, 0]
        return b"".join(layer[..., :128].tobytes() + layer[..., 128:132].tobytes() for layer in entries)
    if "NP" in found.lists:
        return b"".join(layer[:, :, 0, 0].tobytes() + layer[:, :, 0, 1, :4].tobytes() for layer in some)
    return some[:, :, :, 0, 0].tobytes()


def format_of(name: str) -> Format:
    """By its name."""
    return next(known for known in FORMATS if known.name == name)


def sizes_for(found: Format, **changes: int | str) -> Sizes:
    """Sizes that no other format has too."""
    if found.kind == "indexer":
        return replace(Sizes(elements=132, dtype="uint8"), **changes)  # type: ignore[arg-type]
    return replace(Sizes(), **changes)  # type: ignore[arg-type]


BACKEND = {"vllm": "FLASH_ATTN", "sglang": "FA3", "trtllm": "TRTLLM", "vllm-ascend": "ASCEND", "vllm-rbln": "RBLN"}
DEVICE = {"vllm-ascend": "npu", "vllm-rbln": "rbln"}


def declared(found: Format, sizes: Sizes, **changes: int | str) -> Declared:
    """What the format's first engine says of such KV."""
    engine = found.engines[0]
    is_latent = found.kind in ("latent", "indexer")
    backend = BACKEND[engine] if not is_latent or engine != "vllm" else "FLASHMLA"
    facts = Declared(
        engine=engine,
        attention_backend=found.backends[0] if found.backends else backend,
        device=DEVICE.get(engine, "cuda"),
        kind=found.kind,
        num_blocks=sizes.blocks,
        block_tokens=sizes.tokens,
        num_heads=1 if is_latent else sizes.heads,
        head_size=sizes.elements,
        dtype=sizes.dtype,
        order=found.order,
    )
    return replace(facts, **changes)  # type: ignore[arg-type]


_alive: deque[Elements] = deque(maxlen=256)
"""What a spec names must stay where it is for the length of a test."""


def spec_of(array: Elements, name: str, dtype: str) -> TensorSpec:
    """As torch would describe it."""
    _alive.append(array)
    item = array.itemsize
    return TensorSpec(
        name, array.shape, tuple(stride // item for stride in array.strides), item, array.ctypes.data, dtype
    )


def specs_of(arrays: Nested, dtype: str) -> list[TensorSpec] | list[list[TensorSpec]]:
    """Of a list of arrays, or of lists of them."""
    if isinstance(arrays[0], list):
        return [
            [spec_of(array, f"layer {row}.{column}", dtype) for column, array in enumerate(inner)]
            for row, inner in enumerate(arrays)
        ]
    return [spec_of(array, f"layer {row}", dtype) for row, array in enumerate(arrays)]


def part_of(arrays: Nested, facts: Declared) -> Part:
    """Arrays as an engine registers them."""
    return Part(facts, specs_of(arrays, facts.dtype))


def vllm_views(truth: Elements, order: str) -> list[Elements]:
    """Per-layer views [B, H, N, C] of one allocation whose dimensions lie in ``order``, as vLLM 0.32 makes them."""
    logical = truth.transpose(0, 1, 3, 2, 4, 5).reshape(*(truth.shape[i] for i in (0, 1, 3, 2)), -1)
    to_memory = ["LBHNC".index(word) for word in order]
    allocation = np.ascontiguousarray(logical.transpose(to_memory))
    return list(allocation.transpose([order.index(word) for word in "LBHNC"]))


def places(group: LayerGroup, blocks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(address, length) of every run of an extent, in the extent's order: the formula, said once more."""
    for plane in group.planes:
        for block in blocks:
            for index in itertools.product(*(range(count) for count, _ in plane.dims)):
                inner = sum(i * stride for i, (_, stride) in zip(index, plane.dims, strict=True))
                yield plane.address + block * plane.block_stride + inner, plane.run_bytes


def extent(layout: Layout, *blocks: Sequence[int]) -> bytes:
    """The bytes of one chunk; the block ids of it for each group."""
    rows = (places(group, ids) for group, ids in zip(layout.groups, blocks, strict=True))
    return b"".join(ctypes.string_at(address, length) for row in rows for address, length in row)
