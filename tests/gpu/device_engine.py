"""Paged memory on a GPU, a pool in memory of the host, and the copier between them; torch is the oracle."""

from __future__ import annotations

import mmap
import random
import time
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from lmcache.transfer import _native

PAGE_BYTES = 4096
PIECE_BYTES = 64 << 20
WAIT_MAX_S = 120.0
ALWAYS_DIRECT = 1 << 62
ALWAYS_STAGED = 0


def sheet(shape: Sequence[int], order: Sequence[int]) -> torch.Tensor:
    """A view [block, i0, i1, i2, byte] of noise on the GPU whose axes but the last lie in memory in this order."""
    physical = [shape[axis] for axis in order] + [shape[4]]
    memory = torch.randint(0, 256, physical, dtype=torch.uint8, device="cuda")
    return memory.permute([*np.argsort(order).tolist(), 4])


class DeviceEngine:
    """Layers that share block ids, a pool of ``num_extents`` and a copier.

    Args:
        registered: whether the pool is registered with CUDA; else copies go through pinned memory.
    """

    def __init__(
        self,
        layers: Sequence[torch.Tensor],
        blocks_per_chunk: int,
        num_extents: int,
        *,
        direct_bytes_max: int,
        staging_bytes: int = 64 << 20,
        plans_max: int = 8,
        thread_blocks_max: int = 16,
        registered: bool = True,
    ) -> None:
        self.layers = layers
        planes = array("Q")
        for layer in layers:
            dims = [
                word
                for count, stride in zip(layer.shape[1:4], layer.stride()[1:4], strict=True)
                for word in (count, stride if count > 1 else 0)
            ]
            planes.extend([layer.data_ptr(), layer.stride(0), *dims, layer.shape[4]])
        groups = array("Q", [len(layers), layers[0].shape[0], blocks_per_chunk])
        self.blocks_per_chunk = blocks_per_chunk
        self.extent_bytes = sum(layer[0].numel() for layer in layers) * blocks_per_chunk
        self.room = -(-self.extent_bytes // PAGE_BYTES) * PAGE_BYTES
        per_piece = max(1, PIECE_BYTES // self.room)  # no extent straddles a piece
        self.places = [
            (i // per_piece) * max(PIECE_BYTES, self.room) + (i % per_piece) * self.room for i in range(num_extents)
        ]
        self.pool = np.frombuffer(mmap.mmap(-1, self.places[-1] + self.room), np.uint8)
        self.copier = _native.DeviceCopier(
            self.pool,
            planes,
            groups,
            device=0,
            staging_bytes=staging_bytes,
            plans_max=plans_max,
            thread_blocks_max=thread_blocks_max,
            direct_bytes_max=direct_bytes_max,
        )
        if registered:
            step = max(PIECE_BYTES, self.room)
            for offset in range(0, self.pool.size, step):
                self.copier.register(offset, min(step, self.pool.size - offset))

    def extent(self, index: int) -> np.ndarray:
        """The bytes of one extent."""
        return self.pool[self.places[index] : self.places[index] + self.extent_bytes]

    def gathered(self, ids: Sequence[int]) -> bytes:
        """What torch puts into the extent of a chunk."""
        return b"".join(layer[list(ids)].contiguous().cpu().numpy().tobytes() for layer in self.layers)

    def store(self, rows: Sequence[Sequence[int]], indices: Sequence[int], stream: torch.cuda.Stream) -> int:
        """Enqueue a store of chunks into extents, seeds 0; returns its ticket."""
        return self.copier.store(*self._tables(rows, indices), stream.cuda_stream)

    def retrieve(
        self, rows: Sequence[Sequence[int]], indices: Sequence[int], checksums: Iterable[int], stream: torch.cuda.Stream
    ) -> int:
        """Enqueue a retrieve; returns its ticket."""
        return self.copier.retrieve(*self._tables(rows, indices), array("Q", checksums), stream.cuda_stream)

    def finish(self, ticket: int) -> list[int]:
        """Wait for a plan; a word a chunk."""
        deadline = time.monotonic() + WAIT_MAX_S
        while (words := self.copier.finish(ticket)) is None:
            assert time.monotonic() < deadline, "a copy does not end"
            time.sleep(0)
        return np.frombuffer(words, np.uint64).tolist()

    def some_ids(self, rng: random.Random, num_chunks: int) -> list[list[int]]:
        """Different block ids for each chunk."""
        ids = rng.sample(range(self.layers[0].shape[0]), num_chunks * self.blocks_per_chunk)
        return [ids[i::num_chunks] for i in range(num_chunks)]

    def _tables(
        self, rows: Sequence[Sequence[int]], indices: Sequence[int]
    ) -> tuple[array[int], array[int], array[int]]:
        ids = array("q", [block for row in rows for block in row])
        return ids, array("Q", [self.places[index] for index in indices]), array("Q", [0] * len(indices))


def llama_layers(num_blocks: int) -> list[torch.Tensor]:
    """32 layers as vLLM lays them out: 16-token blocks, 8 KV heads of 128 fp16 elements; 64 KiB a block and layer."""
    return [sheet((num_blocks, 16, 8, 2, 256), (0, 1, 2, 3)) for _ in range(32)]
