"""Planes, the groups of layers they belong to, and the layout of one engine process."""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache.errors import LayoutError
from lmcache.layout.overlap import check_disjoint

PLANES_MAX = 1 << 16
DIMS_MAX = 3

FORM_VERSION = 2
"""Part of every namespace: changes when the order of an extent's bytes does (1 was block after block)."""

_U64 = (1 << 64) - 1

Dim = tuple[int, int]
"""(count, stride): ``count`` steps of ``stride`` bytes."""


@dataclass(frozen=True, slots=True)
class Plane:
    """What one layer, or a part of it, has in every block. ``address`` is that of block 0; strides are bytes.

    ``make_plane`` builds one with as few dims as it needs.
    """

    address: int
    block_stride: int
    dims: tuple[Dim, ...]
    run_bytes: int

    def __post_init__(self) -> None:
        if len(self.dims) > DIMS_MAX:
            raise LayoutError(f"a plane has at most {DIMS_MAX} dims beside its blocks, not {len(self.dims)}: {self}")
        if self.address <= 0 or self.run_bytes < 1 or any(count < 1 for count, _ in self.dims):
            raise LayoutError(f"a plane needs an address and at least one byte: {self}")

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in this plane."""
        return math.prod(count for count, _ in self.dims) * self.run_bytes

    def row(self) -> tuple[int, ...]:
        """address, block_stride, c0, s0, c1, s1, c2, s2, run; dims that are not there come first, as (1, 0)."""
        padded = ((1, 0),) * (DIMS_MAX - len(self.dims)) + self.dims
        strides = ((count, stride & _U64) for count, stride in padded)
        return (self.address, self.block_stride, *itertools.chain.from_iterable(strides), self.run_bytes)


def make_plane(address: int, block_stride: int, dims: Sequence[Dim], run_bytes: int) -> Plane:
    """A plane of ``dims`` (count, stride), outermost first; what is contiguous is merged.

    Raises:
        LayoutError: more than three dims remain.
    """
    merged, run_bytes = merge(dims, run_bytes)
    return Plane(address, block_stride, merged, run_bytes)


def merge(dims: Sequence[Dim], run_bytes: int) -> tuple[tuple[Dim, ...], int]:
    """The same bytes in the same order with as few dims as possible, and the longest run."""
    merged: list[Dim] = []
    for count, stride in reversed(dims):
        if count == 1:
            continue
        if not merged and stride == run_bytes:
            run_bytes *= count
        elif merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (count * merged[-1][0], merged[-1][1])
        else:
            merged.append((count, stride))
    return tuple(reversed(merged)), run_bytes


@dataclass(frozen=True)
class Description:
    """Layers in words, for people and dashboards.

    Attributes:
        num_heads: KV heads of a layer on this rank; 1 where a block's inside is not split by heads.
        head_size: elements of one head of K; the whole entry of a token for latent attention.
        dtype: as torch prints it: "torch.float16".
        shape: symbolic: "NL x [2, NB, BS, NH, HS]".
        concrete_shape: "80 x [2, 2048, 128, 8, 128]".
        form: "canonical" or "raw".
    """

    num_layers: int
    num_heads: int
    head_size: int
    dtype: str
    is_mla: bool
    attention_backend: str
    shape: str
    concrete_shape: str
    form: str


@dataclass(frozen=True)
class LayerGroup:
    """Planes whose block ids come from one list. Two blocks never share a byte, and neither do two planes.

    Attributes:
        num_blocks: block ids are 0 to ``num_blocks`` - 1.
        block_tokens: tokens of one block.
        descriptions: of its layers, one for each kind of them; none where nobody looks.
        is_state: a block holds the state after its last token (Mamba), so a chunk has one, not one for all its tokens.

    Raises:
        LayoutError: there is no plane or no block, or two of them share a byte.
    """

    planes: tuple[Plane, ...]
    num_blocks: int
    block_tokens: int
    descriptions: tuple[Description, ...] = ()
    is_state: bool = False

    def __post_init__(self) -> None:
        if not self.planes or len(self.planes) > PLANES_MAX:
            raise LayoutError(f"a layer group has 1 to {PLANES_MAX} planes, not {len(self.planes)}")
        if self.num_blocks < 1 or self.block_tokens < 1:
            raise LayoutError(f"{self.num_blocks} blocks of {self.block_tokens} tokens are no memory")
        check_disjoint([(p.address, p.block_stride, p.dims, p.run_bytes) for p in self.planes], self.num_blocks)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all planes."""
        return sum(plane.block_bytes for plane in self.planes)

    def blocks_per_chunk(self, chunk_tokens: int) -> int:
        """Block ids that a chunk has in this group.

        Raises:
            LayoutError: a chunk is not made of whole blocks.
        """
        if chunk_tokens % self.block_tokens:
            raise LayoutError(
                f"the server's chunk of {chunk_tokens} tokens is no multiple of this engine's block of "
                f"{self.block_tokens}; start the server with --chunk-size "
                f"{-(-chunk_tokens // self.block_tokens) * self.block_tokens}"
            )
        return 1 if self.is_state else chunk_tokens // self.block_tokens


@dataclass(frozen=True)
class Layout:
    """The map of one engine process: its layer groups, in the order of a plan's block ids and of an extent's bytes."""

    groups: tuple[LayerGroup, ...]

    def __post_init__(self) -> None:
        num_planes = sum(len(group.planes) for group in self.groups)
        if not 1 <= num_planes <= PLANES_MAX:
            raise LayoutError(f"a layout has 1 to {PLANES_MAX} planes, not {num_planes}")

    def check_chunk(self, chunk_tokens: int) -> None:
        """Return if chunks of so many tokens are whole blocks in every group.

        Raises:
            LayoutError: they are not; the sentence names the next size that fits all of them.
        """
        step = math.lcm(*(group.block_tokens for group in self.groups))
        if chunk_tokens < 1 or chunk_tokens % step:
            blocks = " and ".join(str(tokens) for tokens in sorted({group.block_tokens for group in self.groups}))
            raise LayoutError(
                f"the server's chunk of {chunk_tokens} tokens is no multiple of this engine's block of {blocks}; "
                f"start the server with --chunk-size {max(1, -(-chunk_tokens // step)) * step}"
            )

    def extent_bytes(self, chunk_tokens: int) -> int:
        """Bytes of one chunk.

        Raises:
            LayoutError: as ``check_chunk``.
        """
        self.check_chunk(chunk_tokens)
        return sum(group.blocks_per_chunk(chunk_tokens) * group.block_bytes for group in self.groups)

    def blocks_per_chunk(self, chunk_tokens: int) -> int:
        """Block ids of one chunk over all groups: the length of a row of a plan.

        Raises:
            LayoutError: as ``check_chunk``.
        """
        self.check_chunk(chunk_tokens)
        return sum(group.blocks_per_chunk(chunk_tokens) for group in self.groups)

    def plane_table(self) -> array[int]:
        """uint64 [num_planes, 9], row-major, group after group: ``Plane.row`` of each; what the copy engine takes."""
        rows = (plane.row() for group in self.groups for plane in group.planes)
        return array("Q", itertools.chain.from_iterable(rows))

    def group_table(self, chunk_tokens: int) -> array[int]:
        """uint64 [num_groups, 3], row-major: num_planes, num_blocks, blocks_per_chunk.

        Raises:
            LayoutError: as ``check_chunk``.
        """
        self.check_chunk(chunk_tokens)
        rows = ((len(g.planes), g.num_blocks, g.blocks_per_chunk(chunk_tokens)) for g in self.groups)
        return array("Q", itertools.chain.from_iterable(rows))
