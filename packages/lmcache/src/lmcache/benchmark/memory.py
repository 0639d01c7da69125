"""The memory of an engine that computes nothing: a known pattern to store, and room for what comes back."""

from __future__ import annotations

import ctypes
import mmap
import random
import struct
from dataclasses import dataclass

from lmcache.layout import LayerGroup, Layout, Plane

_BLOCK_TOKENS = 16
_PARTS = (64, 32, 16, 8, 4, 2, 1)
_STAMP = struct.Struct("<Q")


@dataclass(frozen=True)
class Shape:
    """What one pass moves. A block lies in ``num_parts`` places, as an engine keeps K and V of each layer apart."""

    num_tokens: int
    token_bytes: int
    chunk_tokens: int

    @property
    def num_chunks(self) -> int:
        return self.num_tokens // self.chunk_tokens

    @property
    def block_tokens(self) -> int:
        return self.chunk_tokens if self.chunk_tokens % _BLOCK_TOKENS else _BLOCK_TOKENS

    @property
    def num_blocks(self) -> int:
        return self.num_tokens // self.block_tokens

    @property
    def num_parts(self) -> int:
        return next(parts for parts in _PARTS if self.block_tokens * self.token_bytes % parts == 0)

    @property
    def part_bytes(self) -> int:
        return self.block_tokens * self.token_bytes // self.num_parts

    @property
    def extent_bytes(self) -> int:
        """Bytes of a chunk."""
        return self.chunk_tokens * self.token_bytes

    @property
    def pass_bytes(self) -> int:
        """Bytes that a pass stores, and retrieves."""
        return self.num_tokens * self.token_bytes


class HostMemory:
    """Blocks 0 to ``num_blocks`` hold the pattern; as many behind them take what is retrieved."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._buffer = mmap.mmap(-1, 2 * shape.pass_bytes)
        # Only for the address: a view that stayed would keep the buffer from being closed.
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        step = 2 * shape.num_blocks * shape.part_bytes
        planes = [Plane(base + part * step, shape.part_bytes, (), shape.part_bytes) for part in range(shape.num_parts)]
        self.layout = Layout((LayerGroup(tuple(planes), 2 * shape.num_blocks, shape.block_tokens),))
        source = random.Random(0)
        for start in self._parts():
            self._buffer[start : start + self._half] = source.randbytes(self._half)

    @property
    def _half(self) -> int:
        """Bytes of one part of all blocks of the pattern, and distance to the same part of what is retrieved."""
        return self.shape.num_blocks * self.shape.part_bytes

    def _parts(self) -> range:
        return range(0, 2 * self.shape.pass_bytes, 2 * self._half)

    def stamp(self, number: int) -> None:
        """Make the pattern of this pass another one: a number at the head of every part of every block."""
        if self.shape.part_bytes < _STAMP.size:
            for start in self._parts():
                self._buffer[start] = number & 0xFF
            return
        for start in self._parts():
            for place in range(start, start + self._half, self.shape.part_bytes):
                _STAMP.pack_into(self._buffer, place, number)

    def wipe(self) -> None:
        """Let nothing of an earlier pass be where this one retrieves to."""
        zeros = bytes(self._half)
        for start in self._parts():
            self._buffer[start + self._half : start + 2 * self._half] = zeros

    def is_intact(self) -> bool:
        """Whether every byte that was retrieved is that of the pattern."""
        half = self._half
        return all(
            self._buffer[start : start + half] == self._buffer[start + half : start + 2 * half]
            for start in self._parts()
        )

    def close(self) -> None:
        """Free the memory; no copy may run."""
        self._buffer.close()
