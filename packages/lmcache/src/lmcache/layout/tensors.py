"""One KV tensor as an engine registers it, and the raw form: whole blocks of it, in the order of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lmcache.errors import LayoutError
from lmcache.layout.overlap import Overlap
from lmcache.layout.planes import DIMS_MAX, PLANES_MAX, LayerGroup, Layout, Plane, merge


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One KV tensor of an engine, as torch would describe it. ``strides`` count elements.

    ``dtype`` is torch's name without the module: "float16", "bfloat16", "float8_e4m3fn", "uint8".
    """

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    address: int
    dtype: str

    @property
    def span(self) -> range:
        """Addresses from its first byte to its last."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return range(self.address, self.address + (last + 1) * self.item_bytes)

    def __str__(self) -> str:
        return (
            f"{self.name}: shape {list(self.shape)}, strides {list(self.strides)}, {self.dtype} of "
            f"{self.item_bytes} bytes an element"
        )


def make_layout(tensors: Sequence[TensorSpec], num_blocks: int, block_tokens: int) -> Layout:
    """The layout, raw and of one group, of an engine that registered ``tensors``.

    Raises:
        LayoutError: as ``raw_group``.
    """
    return Layout((raw_group(tensors, num_blocks, block_tokens),))


def raw_group(tensors: Sequence[TensorSpec], num_blocks: int, block_tokens: int) -> LayerGroup:
    """Whole blocks of ``tensors``, in that order; the same tensor under several names counts once.

    Raises:
        LayoutError: a tensor has no dimension of ``num_blocks``, several that could be it, or overlaps another.
    """
    planes = [plane for tensor in distinct(tensors) for plane in raw_planes(tensor, num_blocks, block_tokens)]
    with showing(planes, tensors):
        return LayerGroup(tuple(planes), num_blocks, block_tokens)


@contextlib.contextmanager
def showing(planes: Sequence[Plane], tensors: Sequence[TensorSpec]) -> Iterator[None]:
    """Let a refusal of ``planes`` say in which of ``tensors`` they lie."""
    try:
        yield
    except Overlap as error:
        places = [planes[number].address for number in error.planes]
        shown = [str(tensor) for tensor in tensors if any(place in tensor.span for place in places)]
        raise LayoutError("; ".join((f"{error}: {shown[0]}", *shown[1:2])) if shown else str(error)) from None


def distinct(tensors: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Tensors in their order, each memory once: layers that share KV register it under several names."""
    seen: dict[tuple[object, ...], TensorSpec] = {}
    for tensor in tensors:
        seen.setdefault((tensor.address, tensor.shape, tensor.strides), tensor)
    return list(seen.values())


def check_strides(tensor: TensorSpec) -> None:
    """Return if every element has a place of its own going by the signs of the strides.

    Raises:
        LayoutError: a dimension is expanded or reversed, or there is none, or one is empty.
    """
    if len(tensor.shape) != len(tensor.strides) or not all(size > 0 for size in tensor.shape) or not tensor.shape:
        raise LayoutError(f"KV tensor not understood, it is empty or has no dimensions: {tensor}")
    if any(stride <= 0 for stride, size in zip(tensor.strides, tensor.shape, strict=True) if size > 1):
        raise LayoutError(f"KV tensor not understood, a dimension is expanded or reversed: {tensor}")


def raw_planes(tensor: TensorSpec, num_blocks: int, block_tokens: int) -> list[Plane]:
    """Whole blocks of one tensor, dims in the order of memory.

    Raises:
        LayoutError: it has no dimension of ``num_blocks``, or several that could be it.
    """
    check_strides(tensor)
    item = tensor.item_bytes
    dims = [(size, stride * item) for size, stride in zip(tensor.shape, tensor.strides, strict=True)]
    split = _split(tensor, num_blocks, block_tokens)
    if split > 1:
        dims[:1] = [(num_blocks, dims[0][1] * split), (split, dims[0][1])]
    block_dim = 0 if split > 1 else _block_dim(tensor, num_blocks)
    step = dims.pop(block_dim)[1]
    inner = sorted((dim for dim in dims if dim[0] > 1), key=lambda dim: -dim[1])
    merged = merge(inner, item)
    # More dims than a plane has: no engine's tensor; the outermost become planes of their own.
    starts = [tensor.address]
    for count, stride in merged[0][:-DIMS_MAX]:
        starts = [start + stride * index for start in starts for index in range(count)]
        if len(starts) > PLANES_MAX:
            raise LayoutError(f"KV tensor not understood, a block of it lies in too many places: {tensor}")
    return [Plane(start, step, merged[0][-DIMS_MAX:], merged[1]) for start in starts]


def _split(tensor: TensorSpec, num_blocks: int, block_tokens: int) -> int:
    """Blocks of the tensor that are one of the block table: vLLM cuts its blocks into smaller ones for some kernels, so
    that a tensor has more of them, with fewer tokens."""
    size, others = tensor.shape[0], tensor.shape[1:]
    split = size // num_blocks
    is_cut = split > 1 and size % num_blocks == 0 and block_tokens % split == 0 and block_tokens // split in others
    return split if is_cut and others[:1] != (num_blocks,) else 1


def _block_dim(tensor: TensorSpec, num_blocks: int) -> int:
    """Blocks come first in today's engines and second (after K and V) in older ones; anything else is refused."""
    candidates = [dim for dim, size in enumerate(tensor.shape[:2]) if size == num_blocks]
    if not candidates or (len(candidates) == 2 and num_blocks > 1):
        raise LayoutError(
            f"KV tensor not understood, expected {num_blocks} blocks in its first or second dimension: {tensor}"
        )
    return candidates[0]
