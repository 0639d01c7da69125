"""Copies to and from a GPU that the host plays: the module of the gate `cuda`, and numpy as the oracle."""

from __future__ import annotations

import importlib.util
import itertools
import mmap
import os
import random
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import xxhash
from numpy.typing import NDArray

LEAF_BYTES = 16384
PAGE_BYTES = 4096
NOT_WRITTEN = -1

Bytes = NDArray[np.uint8]
View = NDArray[np.uint8]
"""What a plane names, as bytes [block, i0, i1, i2, byte] with the strides of the engine's memory."""


def load() -> ModuleType:
    """The native module built with LMCACHE_CUDA=EMULATED in the folder LMCACHE_TEST_EMULATED."""
    (path,) = Path(os.environ["LMCACHE_TEST_EMULATED"]).glob("_native*.so")
    spec = importlib.util.spec_from_file_location("_native", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native = load()


def checksum(data: bytes, seed: int) -> int:
    """The definition: XXH3-64, seeded, over the little-endian XXH3-64 of 16 KiB leaves."""
    leaves = [data[at : at + LEAF_BYTES] for at in range(0, len(data), LEAF_BYTES)]
    hashes = b"".join(xxhash.xxh3_64_intdigest(leaf).to_bytes(8, "little") for leaf in leaves)
    return xxhash.xxh3_64_intdigest(hashes, seed=seed)


def sheet(rng: random.Random, shape: Sequence[int], order: Sequence[int], gap: int = 0) -> View:
    """A view [block, i0, i1, i2, byte] of new noise whose axes but the last lie in memory in this order.

    Args:
        gap: bytes between two runs that belong to nobody.
    """
    physical = [shape[axis] for axis in order] + [shape[4] + gap]
    memory = np.frombuffer(bytearray(rng.randbytes(int(np.prod(physical)))), np.uint8).reshape(physical)
    return memory[..., : shape[4]].transpose([*np.argsort(order), 4])


def permutations() -> list[tuple[int, ...]]:
    """Every order in memory of block, i0, i1, i2."""
    return list(itertools.permutations(range(4)))


class Engine:
    """Paged memory: groups of views that share block ids, the pool, and a copier between them."""

    def __init__(self, groups: Sequence[Sequence[View]], blocks_per_chunk: Sequence[int], **limits: int) -> None:
        self.groups = groups
        self.blocks_per_chunk = blocks_per_chunk
        planes = [
            (view.ctypes.data, view.strides[0], *_dims(view), view.shape[4]) for group in groups for view in group
        ]
        self.planes = array("Q", [value % 2**64 for plane in planes for value in plane])
        self.group_rows = array(
            "Q",
            [
                value
                for group, count in zip(groups, blocks_per_chunk, strict=True)
                for value in (len(group), group[0].shape[0], count)
            ],
        )
        self.extent_bytes = sum(
            count * view[0].size for group, count in zip(groups, blocks_per_chunk, strict=True) for view in group
        )
        self.room = -(-self.extent_bytes // PAGE_BYTES) * PAGE_BYTES
        self.pool = np.frombuffer(mmap.mmap(-1, 4 * self.room), np.uint8)
        defaults = {"device": 0, "staging_bytes": 1 << 20, "plans_max": 2, "thread_blocks_max": 2}
        settings = {**defaults, "direct_bytes_max": 1 << 40, **limits}
        self.copier = native.DeviceCopier(self.pool, self.planes, self.group_rows, **settings)
        self.copier.register(0, self.pool.size)
        self.stream = native.emulation.make_stream()

    def extent(self, index: int) -> Bytes:
        """The bytes of the index-th extent of the pool."""
        return self.pool[index * self.room : index * self.room + self.extent_bytes]

    def gathered(self, ids: Sequence[int]) -> bytes:
        """What numpy puts into the extent of a chunk."""
        parts, first = [], 0
        for group, count in zip(self.groups, self.blocks_per_chunk, strict=True):
            parts += [view[list(ids[first : first + count])].tobytes() for view in group]
            first += count
        return b"".join(parts)

    def store(self, ids: Sequence[int], index: int, seed: int) -> int:
        """Copy one chunk into an extent; returns its checksum."""
        tables = (array("q", ids), array("Q", [index * self.room]), array("Q", [seed]))
        return self._wait(self.copier.store(*tables, self.stream))

    def retrieve(self, ids: Sequence[int], index: int, seed: int, expected: int) -> bool:
        """Copy one extent into blocks; returns whether it had the expected checksum."""
        tables = (array("q", ids), array("Q", [index * self.room]), array("Q", [seed]), array("Q", [expected]))
        return bool(self._wait(self.copier.retrieve(*tables, self.stream)))

    def _wait(self, ticket: int) -> int:
        assert self.copier.finish(ticket) is None
        while native.emulation.step():
            pass
        (word,) = np.frombuffer(self.copier.finish(ticket), np.uint64)
        return int(word)


def _dims(view: View) -> tuple[int, ...]:
    """c0, s0, c1, s1, c2, s2."""
    return tuple(
        itertools.chain.from_iterable(
            (count, stride if count > 1 else 0)
            for count, stride in zip(view.shape[1:4], view.strides[1:4], strict=True)
        )
    )
