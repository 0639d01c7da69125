"""Canonical planes: a layer's K and V as [token][head][K|V][element], wherever the engine keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmcache.errors import LayoutError
from lmcache.layout.declared import ITEM_BYTES, Declared
from lmcache.layout.formats import INDEXER_SCALE_BYTES, INDEXER_VALUE_BYTES, Format
from lmcache.layout.planes import DIMS_MAX, Plane, make_plane, merge
from lmcache.layout.tensors import TensorSpec, check_strides


@dataclass(frozen=True)
class Steps:
    """A tensor's strides in bytes, by what they step over. ``tokens`` and ``heads`` are dims (count, stride)."""

    block: int
    tokens: tuple[tuple[int, int], ...]
    heads: tuple[tuple[int, int], ...]
    by_word: Mapping[str, int]


def canonical_planes(found: Format, split: int, tensors: Sequence[Sequence[TensorSpec]], of: Declared) -> list[Plane]:
    """Planes of layers, in their order.

    Args:
        split: blocks of the tensors that make one block of the engine's block table.
        tensors: of each layer: one, or K and V, or one a plane; one row for all layers where the format has no list.

    Raises:
        LayoutError: the format does not allow a canonical form of these tensors.
    """
    planes: list[Plane] = []
    for layer in tensors:
        for tensor in layer:
            _check(tensor, of)
        if found.kind == "indexer":
            planes += _indexer(found, split, layer[0], of)
        elif "NL" in found.axes:
            planes += _cross_layer(found, split, layer[0], of)
        elif found.lists in (("NL", "2"), ("2", "NL")):
            planes += _apart(found, split, layer, of)
        else:
            for tensor in layer:
                planes += _together(found, split, tensor, tensor.address, of)
    return planes


def _check(tensor: TensorSpec, of: Declared) -> None:
    check_strides(tensor)
    if tensor.dtype != of.dtype or ITEM_BYTES.get(tensor.dtype) != tensor.item_bytes:
        raise LayoutError(f"KV tensor not understood, expected elements of {of.dtype}: {tensor}")
    if tensor.shape[-1] > 1 and tensor.strides[-1] != 1:
        raise LayoutError(f"KV tensor not understood, the elements of a head are not side by side: {tensor}")


def _steps(found: Format, split: int, tensor: TensorSpec, of: Declared) -> Steps:
    strides = {word: stride * tensor.item_bytes for word, stride in zip(found.axes, tensor.strides, strict=True)}
    if "PBS" in strides:
        block, tokens = strides["PBS"] * of.block_tokens, [(of.block_tokens, strides["PBS"])]
    else:
        block, tokens = strides["NB"] * split, [(split, strides["NB"]), (of.block_tokens // split, strides["BS"])]
    heads = [(of.num_heads, strides["NH"])] if "NH" in strides else []
    return Steps(block, tuple(tokens), tuple(heads), strides)


def _together(found: Format, split: int, tensor: TensorSpec, address: int, of: Declared) -> list[Plane]:
    """A layer in one tensor."""
    steps, item = _steps(found, split, tensor, of), tensor.item_bytes
    dims = [*steps.tokens, *steps.heads]
    if "CS" in found.axes:
        if of.value_size == of.head_size:
            return [_plane(tensor, address, steps.block, dims, 2 * of.head_size * item)]
        value = address + of.head_size * item
        return [
            _plane(tensor, address, steps.block, dims, of.head_size * item),
            _plane(tensor, value, steps.block, dims, of.value_size * item),
        ]
    if "2" in found.axes:
        dims.append((2, steps.by_word["2"]))
    return [_plane(tensor, address, steps.block, dims, tensor.shape[-1] * item)]


def _apart(found: Format, split: int, layer: Sequence[TensorSpec], of: Declared) -> list[Plane]:
    """A layer whose K and V are tensors of their own: one plane if they have the same strides, as far apart as K and V
    are."""
    key, value = layer
    if (key.shape[-1], value.shape[-1]) != (of.head_size, of.value_size):
        raise LayoutError(
            f"KV tensors not understood, expected heads of {of.head_size} in K and {of.value_size} in V: {key}; {value}"
        )
    steps = _steps(found, split, key, of)
    dims, run = [*steps.tokens, *steps.heads], key.shape[-1] * key.item_bytes
    if key.shape != value.shape:
        others = _steps(found, split, value, of)
        return [
            _plane(key, key.address, steps.block, dims, run),
            _plane(
                value,
                value.address,
                others.block,
                [*others.tokens, *others.heads],
                value.shape[-1] * value.item_bytes,
            ),
        ]
    if key.strides != value.strides or key.dtype != value.dtype:
        raise LayoutError(f"KV tensors not understood, K and V of a layer lie differently: {key}; {value}")
    return [_plane(key, key.address, steps.block, [*dims, (2, value.address - key.address)], run)]


def _cross_layer(found: Format, split: int, tensor: TensorSpec, of: Declared) -> list[Plane]:
    """All layers in one tensor."""
    dim = found.axes.index("NL")
    step = tensor.strides[dim] * tensor.item_bytes
    starts = (tensor.address + layer * step for layer in range(tensor.shape[dim]))
    return [plane for start in starts for plane in _together(found, split, tensor, start, of)]


def _indexer(found: Format, split: int, tensor: TensorSpec, of: Declared) -> list[Plane]:
    """Two planes: the values of a block's tokens come before their scales, whatever the shape says of 132 bytes."""
    steps, tokens = _steps(found, split, tensor, of), of.block_tokens // split
    if steps.by_word["BS"] != INDEXER_VALUE_BYTES + INDEXER_SCALE_BYTES or tensor.item_bytes != 1:
        raise LayoutError(f"KV tensor not understood, the bytes of an indexer's block are not side by side: {tensor}")
    dims = [(split, steps.by_word["NB"])]
    scales = tensor.address + tokens * INDEXER_VALUE_BYTES
    return [
        _plane(tensor, tensor.address, steps.block, dims, tokens * INDEXER_VALUE_BYTES),
        _plane(tensor, scales, steps.block, dims, tokens * INDEXER_SCALE_BYTES),
    ]


def _plane(tensor: TensorSpec, address: int, block: int, dims: Sequence[tuple[int, int]], run_bytes: int) -> Plane:
    merged, _ = merge(dims, run_bytes)
    if len(merged) > DIMS_MAX:
        # Only cut blocks have as many: pieces, tokens, heads, K|V, and no two of them contiguous.
        raise LayoutError(
            f"KV tensor not understood, blocks that a kernel has cut, heads outside tokens and K apart from V are too "
            f"much together; start the engine with blocks of {dims[1][0]} tokens, which are not cut: {tensor}"
        )
    return make_plane(address, block, dims, run_bytes)
