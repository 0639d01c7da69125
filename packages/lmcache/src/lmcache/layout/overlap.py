"""Whether two blocks, or two planes, share a byte: answered from strides, without visiting every fragment.

Strides nest in every layout that engines use: what one step of a stride skips is at least as long as everything that
smaller strides reach. A plane that nests is free of overlaps with itself. Planes whose ranges of memory interleave must
interleave by the same strides; then one period of the largest stride stands for all of it, and what is left inside it
is compared in the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lmcache.errors import LayoutError

PIECES_MAX = 1 << 17

Map = tuple[int, int, Sequence[tuple[int, int]], int]
"""address, block_stride, dims (count, stride), run."""


class Overlap(LayoutError):
    """A byte may be named twice. ``planes``: the numbers of those that do it."""

    def __init__(self, sentence: str, planes: Iterable[int]) -> None:
        super().__init__(sentence)
        self.planes = tuple(sorted(set(planes)))


class _Piece(NamedTuple):
    """A place of a plane. ``nest``: (count, stride, span) from the largest stride; one step of it holds a span."""

    plane: int
    start: int
    nest: tuple[tuple[int, int, int], ...]
    run: int

    @property
    def span(self) -> int:
        """Bytes from the first to the last."""
        return (self.nest[0][0] - 1) * self.nest[0][1] + self.nest[0][2] if self.nest else self.run


def check_disjoint(planes: Iterable[Map], num_blocks: int) -> None:
    """Return if no byte is named twice over all planes and blocks.

    Raises:
        Overlap: one may be; also where memory is shared in a way that we cannot follow.
        LayoutError: there are too many places to compare.
    """
    pieces: list[_Piece] = []
    for number, plane in enumerate(planes):
        pieces += _pieces(number, plane, num_blocks)
        if len(pieces) > PIECES_MAX:
            raise LayoutError(f"a layer group lies in more than {PIECES_MAX} places")
    _check(pieces)


def _pieces(number: int, plane: Map, num_blocks: int) -> list[_Piece]:
    """The plane, apart at dims that lie outside its blocks (K and V of older engines): each place has its own
    neighbours."""
    address, block_stride, dims, run = plane
    if block_stride <= 0 and num_blocks > 1:
        raise Overlap(f"a stride of {block_stride} bytes from a block to the next is not understood", (number,))
    starts, inner = [address], [(num_blocks, block_stride)] if num_blocks > 1 else []
    for count, stride in dims:
        if stride < 0:
            starts = [start + stride * (count - 1) for start in starts]
            stride = -stride
        if stride > block_stride and count * len(starts) <= PIECES_MAX:
            starts = [start + stride * index for start in starts for index in range(count)]
        else:
            inner.append((count, stride))
    nest, span = [], run
    for count, stride in sorted(inner, key=lambda dim: dim[1]):
        if stride < span:
            what = "blocks overlap" if stride == block_stride else "a plane overlaps itself"
            raise Overlap(f"{what}: {span} bytes every {stride}", (number,))
        nest.append((count, stride, span))
        span += stride * (count - 1)
    return [_Piece(number, start, tuple(reversed(nest)), run) for start in starts]


def _check(pieces: Sequence[_Piece]) -> None:
    for cluster in _clusters(pieces):
        if len(cluster) == 1:
            continue
        if not all(piece.nest for piece in cluster):
            raise _overlap(cluster)
        period, base = cluster[0].nest[0][1], cluster[0].start
        other = next((piece for piece in cluster if piece.nest[0][1] != period), None)
        if other is not None:
            raise Overlap("KV tensors of different block strides share memory", (cluster[0].plane, other.plane))
        inside = [_Piece(p.plane, (p.start - base) % period, p.nest[1:], p.run) for p in cluster]
        beyond = next((piece for piece in inside if piece.start + piece.span > period), None)
        if beyond is not None:
            raise Overlap("KV tensors overlap in memory", (cluster[0].plane, beyond.plane))
        _check(inside)


def _overlap(cluster: Sequence[_Piece]) -> Overlap:
    """Of a cluster of which at least one has no strides left: it and its neighbour meet, or the one is inside the
    other's holes, which no engine does."""
    index = next(index for index, piece in enumerate(cluster) if not piece.nest)
    neighbour = cluster[index - 1 if index else 1]
    return Overlap("KV tensors overlap in memory", (cluster[index].plane, neighbour.plane))


def _clusters(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces whose ranges touch each other, in the order of memory."""
    clusters: list[list[_Piece]] = []
    end = -1
    for piece in sorted(pieces, key=lambda piece: piece.start):
        if piece.start >= end:
            clusters.append([])
        clusters[-1].append(piece)
        end = max(end, piece.start + piece.span)
    return clusters
