"""The copy engine's numpy oracle: an engine's memory, a pool, and what a copy between them must do."""

from __future__ import annotations

import mmap
import random
import tempfile
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
class World:
    """Tables of one plan beside the memory that they describe.

    Args:
        lengths: bytes of each segment.
        num_blocks: blocks of the engine's memory.
        rows: block ids, a tuple a chunk.
        skew: bytes that shift segments and extents off any alignment.
        threads: how many copy.
    """

    lengths: list[int]
    num_blocks: int
    rows: list[tuple[int, ...]]
    skew: int = 0
    threads: int = 1
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.strides = [length + self.rng.choice((0, 0, 7, 64)) for length in self.lengths]
        self.memory = [
            noise(self.rng, self.skew + (self.num_blocks - 1) * stride + length)
            for length, stride in zip(self.lengths, self.strides, strict=True)
        ]
        self.extent_bytes = sum(self.lengths) * (len(self.rows[0]) if self.rows else 0)
        room = self.extent_bytes + self.rng.choice((0, 1, -self.extent_bytes % 64))
        places = list(range(len(self.rows)))
        self.rng.shuffle(places)
        self.offsets = np.array([self.skew + place * room for place in places], np.uint64)
        self.seeds = np.array([self.rng.getrandbits(64) for _ in self.rows], np.uint64)
        self.blocks = np.array(self.rows, np.int64)
        self.pool = tmpfs_pool(self.skew + len(self.rows) * room + 64)
        self.pool[:] = noise(self.rng, self.pool.size)
        self.segments = np.array(
            [
                [memory.ctypes.data + self.skew, stride, length]
                for memory, stride, length in zip(self.memory, self.strides, self.lengths, strict=True)
            ],
            np.uint64,
        )

    def block(self, block: int) -> list[Bytes]:
        """Views of the segments of one block."""
        starts = [self.skew + block * stride for stride in self.strides]
        return [
            memory[start : start + length]
            for memory, start, length in zip(self.memory, starts, self.lengths, strict=True)
        ]

    def extent(self, chunk: int) -> Bytes:
        """View of the extent of one chunk."""
        start = int(self.offsets[chunk])
        return self.pool[start : start + self.extent_bytes]

    def gathered(self, chunk: int) -> bytes:
        """What a store has to put into the extent."""
        return b"".join(piece.tobytes() for block in self.rows[chunk] for piece in self.block(block))

    def scatter(self, chunk: int) -> None:
        """What a retrieve has to do, done by numpy."""
        at = 0
        for block in self.rows[chunk]:
            for length, piece in zip(self.lengths, self.block(max(block, 0)), strict=True):
                if block >= 0:
                    piece[:] = self.extent(chunk)[at : at + length]
                at += length

    def store(self) -> list[int]:
        """The native call; checksums as integers."""
        sums = _native.store(
            self.pool, self.segments, self.num_blocks, self.blocks, self.offsets, self.seeds, self.threads
        )
        return [int(value) for value in np.frombuffer(sums, "<u8")]

    def retrieve(self, checksums: list[int]) -> bytes:
        """The native call."""
        expected = np.array(checksums, np.uint64)
        return _native.retrieve(
            self.pool, self.segments, self.num_blocks, self.blocks, self.offsets, self.seeds, expected, self.threads
        )

    def checksums(self) -> list[int]:
        """Of the bytes that are in the extents now."""
        return [checksum(self.extent(chunk).tobytes(), int(self.seeds[chunk])) for chunk in range(len(self.rows))]
