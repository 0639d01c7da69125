"""Where an engine keeps the bytes of a block: one affine formula, checked once.

Byte ``i`` of segment ``s`` of block ``b`` lies at ``address[s] + b * stride_bytes[s] + i``, for every layout that
engines use; what differs is how many segments there are and how long each is. The segments are the longest runs of
bytes that are contiguous inside one block of one tensor, in the order of the tensor's own dimensions, tensors in the
order they were registered. That a plan built on a layout cannot leave the engine's memory is established here, at
construction.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache.errors import LayoutError

SEGMENTS_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One KV tensor of an engine, as torch would describe it. ``strides`` count elements."""

    name: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    address: int

    def __str__(self) -> str:
        return (
            f"{self.name}: shape {list(self.shape)}, strides {list(self.strides)}, {self.item_bytes} bytes an element"
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of bytes in every block. ``address`` is that of block 0, ``stride_bytes`` the step from a block to the
    next."""

    address: int
    stride_bytes: int
    length_bytes: int


@dataclass(frozen=True)
class Layout:
    """The map of one engine process. Two blocks never share a byte, and neither do two segments."""

    segments: tuple[Segment, ...]
    num_blocks: int

    def __post_init__(self) -> None:
        if not self.segments or len(self.segments) > SEGMENTS_MAX:
            raise LayoutError(f"a block has 1 to {SEGMENTS_MAX} segments, not {len(self.segments)}")
        _check_disjoint(self.segments, self.num_blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers on this rank."""
        return sum(segment.length_bytes for segment in self.segments)

    def table(self) -> array[int]:
        """uint64 [num_segments, 3], row-major: address, stride_bytes, length_bytes; what the copy engine takes."""
        rows = ((s.address, s.stride_bytes, s.length_bytes) for s in self.segments)
        return array("Q", itertools.chain.from_iterable(rows))


def make_layout(tensors: Sequence[TensorSpec], num_blocks: int) -> Layout:
    """The layout of an engine that registered ``tensors``; the same tensor under several names counts once.

    Raises:
        LayoutError: a tensor has no dimension of ``num_blocks``, several that could be it, or overlaps another.
    """
    distinct = {(t.address, t.shape, t.strides): t for t in reversed(tensors)}
    ordered = sorted(distinct.values(), key=tensors.index)
    segments = [segment for tensor in ordered for segment in _segments(tensor, num_blocks)]
    return Layout(tuple(segments), num_blocks)


def _segments(tensor: TensorSpec, num_blocks: int) -> list[Segment]:
    if any(stride <= 0 for stride, size in zip(tensor.strides, tensor.shape, strict=True) if size > 1):
        raise LayoutError(f"KV tensor not understood, a dimension is expanded or reversed: {tensor}")
    block_dim = _block_dim(tensor, num_blocks)
    inner = [
        (stride * tensor.item_bytes, size)
        for dim, (stride, size) in enumerate(zip(tensor.strides, tensor.shape, strict=True))
        if dim != block_dim and size > 1
    ]
    # Physically innermost first: grow the contiguous run until a gap, what remains outside is enumerated.
    run = tensor.item_bytes
    outer = sorted(inner)
    while outer and outer[0][0] == run:
        run *= outer.pop(0)[1]
    starts = [0]
    for stride, size in reversed(outer):
        starts = [start + stride * index for start in starts for index in range(size)]
    step = tensor.strides[block_dim] * tensor.item_bytes
    return [Segment(tensor.address + start, step, run) for start in starts]


def _block_dim(tensor: TensorSpec, num_blocks: int) -> int:
    """Blocks come first in today's engines and second (after K and V) in older ones; anything else is refused."""
    candidates = [dim for dim, size in enumerate(tensor.shape[:2]) if size == num_blocks]
    if not candidates or (len(candidates) == 2 and num_blocks > 1):
        raise LayoutError(
            f"KV tensor not understood, expected {num_blocks} blocks in its first or second dimension: {tensor}"
        )
    return candidates[0]


def _check_disjoint(segments: Sequence[Segment], num_blocks: int) -> None:
    """Where the ranges of two segments interleave (blocks outermost), they must not touch modulo their common
    stride."""
    clusters: list[list[Segment]] = []
    end = -1
    for segment in sorted(segments, key=lambda s: s.address):
        if num_blocks > 1 and segment.length_bytes > segment.stride_bytes:
            raise LayoutError(f"blocks overlap: {segment.length_bytes} bytes every {segment.stride_bytes}")
        if segment.address >= end:
            clusters.append([])
        clusters[-1].append(segment)
        end = max(end, segment.address + segment.stride_bytes * (num_blocks - 1) + segment.length_bytes)
    for cluster in clusters:
        if len(cluster) > 1:
            _check_interleaved(cluster)


def _check_interleaved(cluster: Sequence[Segment]) -> None:
    stride, base = cluster[0].stride_bytes, cluster[0].address
    if any(segment.stride_bytes != stride for segment in cluster):
        raise LayoutError("KV tensors of different block strides share memory")
    spans = sorted(((s.address - base) % stride, s.length_bytes) for s in cluster)
    spans.append((spans[0][0] + stride, 0))
    for (start, length), (following, _) in itertools.pairwise(spans):
        if start + length > following:
            raise LayoutError("KV tensors overlap in memory")
