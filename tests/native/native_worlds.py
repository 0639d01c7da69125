"""The copy engine's numpy oracle: an engine's memory, a pool, and what a copy between them must do."""

from __future__ import annotations

import mmap
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash
from numpy.typing import NDArray

from lmcache.transfer import _native

LEAF_BYTES = 16384

Bytes = NDArray[np.uint8]


def checksum(data: bytes, seed: int) -> int:
    """The definition: XXH3-64, seeded, over the little-endian XXH3-64 of 16 KiB leaves."""
    leaves = [data[at : at + LEAF_BYTES] for at in range(0, len(data), LEAF_BYTES)]
    hashes = b"".join(xxhash.xxh3_64_intdigest(leaf).to_bytes(8, "little") for leaf in leaves)
    return xxhash.xxh3_64_intdigest(hashes, seed=seed)


def tmpfs_pool(num_bytes: int) -> Bytes:
    """Shared memory as the server hands it out: a mapped tmpfs file without a name."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(num_bytes)
        return np.frombuffer(mmap.mmap(file.fileno(), num_bytes), np.uint8)


def noise(rng: random.Random, num_bytes: int) -> Bytes:
    """Random bytes, writable."""
    return np.frombuffer(bytearray(rng.randbytes(num_bytes)), np.uint8)


@dataclass
class PlaneWorld:
    """Memory of one plane: ``num_blocks`` blocks of ``counts`` runs, blocks and dims around the run in any order of
    memory, with gaps, forwards or backwards. ``skew`` shifts it off any alignment."""

    num_blocks: int
    run: int
    counts: tuple[int, int, int] = (1, 1, 1)
    skew: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        sizes = (self.num_blocks, *self.counts)
        order = self.rng.sample(range(4), 4)
        strides, reach = [0, 0, 0, 0], self.run
        for dim in order:
            strides[dim] = reach + self.rng.choice((0, 0, 7, 64))
            reach += (sizes[dim] - 1) * strides[dim]
        self.memory = noise(self.rng, self.skew + reach)
        self.view = np.lib.stride_tricks.as_strided(self.memory[self.skew :], (*sizes, self.run), (*strides, 1))
        for dim in range(4):
            if not self.rng.randrange(4):
                self.view = np.flip(self.view, dim)
        self.address: int = self.view.__array_interface__["data"][0]

    def row(self) -> list[int]:
        """Of the native table of planes."""
        block_stride, *strides = self.view.strides[:4]
        dims = [number for dim in zip(self.counts, strides, strict=True) for number in dim]
        return [number % (1 << 64) for number in (self.address, block_stride, *dims, self.run)]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.view[0].size


@dataclass
class World:
    """Tables of one plan beside the memory that they describe.

    Args:
        groups: the planes of each layer group.
        rows: block ids, a tuple a chunk: those of the first group, then of the next.
        per_chunk: how many of them each group has.
        skew: bytes that shift extents off any alignment.
        threads: how many copy.
    """

    groups: list[list[PlaneWorld]]
    rows: list[tuple[int, ...]]
    per_chunk: list[int]
    skew: int = 0
    threads: int = 1
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.extent_bytes = sum(
            plane.block_bytes * count
            for group, count in zip(self.groups, self.per_chunk, strict=True)
            for plane in group
        )
        room = self.extent_bytes + self.rng.choice((0, 1, -self.extent_bytes % 64))
        places = list(range(len(self.rows)))
        self.rng.shuffle(places)
        self.offsets = np.array([self.skew + place * room for place in places], np.uint64)
        self.seeds = np.array([self.rng.getrandbits(64) for _ in self.rows], np.uint64)
        self.blocks = np.array(self.rows, np.int64)
        self.pool = tmpfs_pool(self.skew + len(self.rows) * room + 64)
        self.pool[:] = noise(self.rng, self.pool.size)
        self.planes = np.array([plane.row() for group in self.groups for plane in group], np.uint64)
        self.group_rows = np.array(
            [[len(g), g[0].num_blocks, count] for g, count in zip(self.groups, self.per_chunk, strict=True)], np.uint64
        )

    @classmethod
    def of_runs(cls, lengths: list[int], num_blocks: int, rows: list[tuple[int, ...]], threads: int = 1) -> World:
        """One group of planes of one run each."""
        group = [PlaneWorld(num_blocks, length) for length in lengths]
        return cls([group], rows, [len(rows[0]) if rows else 1], threads=threads)

    @property
    def memory(self) -> list[Bytes]:
        """All memory of the engine, gaps included."""
        return [plane.memory for group in self.groups for plane in group]

    def block(self, block: int) -> list[Bytes]:
        """Views of one block of the first group, a plane each."""
        return [plane.view[block] for plane in self.groups[0]]

    def extent(self, chunk: int) -> Bytes:
        """View of the extent of one chunk."""
        start = int(self.offsets[chunk])
        return self.pool[start : start + self.extent_bytes]

    def pieces(self, chunk: int) -> Iterator[tuple[Bytes | None, int]]:
        """In the order of the extent: a block of a plane (None where its id is -1), and where its bytes start."""
        at, first = 0, 0
        for group, count in zip(self.groups, self.per_chunk, strict=True):
            for plane in group:
                for block in self.rows[chunk][first : first + count]:
                    yield (plane.view[block] if block >= 0 else None), at
                    at += plane.block_bytes
            first += count

    def gathered(self, chunk: int) -> bytes:
        """What a store has to put into the extent."""
        return b"".join(piece.tobytes() for piece, _ in self.pieces(chunk) if piece is not None)

    def scatter(self, chunk: int) -> None:
        """What a retrieve has to do, done by numpy."""
        for piece, at in self.pieces(chunk):
            if piece is not None:
                piece[:] = self.extent(chunk)[at : at + piece.size].reshape(piece.shape)

    def store(self) -> list[int]:
        """The native call; checksums as integers."""
        sums = _native.store(
            self.pool, self.planes, self.group_rows, self.blocks, self.offsets, self.seeds, self.threads
        )
        return [int(value) for value in np.frombuffer(sums, "<u8")]

    def retrieve(self, checksums: list[int]) -> bytes:
        """The native call."""
        expected = np.array(checksums, np.uint64)
        return _native.retrieve(
            self.pool, self.planes, self.group_rows, self.blocks, self.offsets, self.seeds, expected, self.threads
        )

    def checksums(self) -> list[int]:
        """Of the bytes that are in the extents now."""
        return [checksum(self.extent(chunk).tobytes(), int(self.seeds[chunk])) for chunk in range(len(self.rows))]
