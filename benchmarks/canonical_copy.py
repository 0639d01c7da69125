"""What canonical chunks cost: the same blocks copied raw and in canonical form, against plain memcpy.

    python benchmarks/canonical_copy.py [--json PATH] [--total-mib 256] [--rounds 9]

One thread moves 16-token blocks of 8 layers (8 heads of 128, bfloat16: 64 KiB a block of a layer), in a shuffled order,
between anonymous memory and a MAP_SHARED tmpfs file, everything touched beforehand. For each format the three take
turns. "ours" is the canonical copy, "raw" the copy that keeps the engine's order of bytes, both with a checksum of
every chunk; memcpy is numpy's ``take`` of the same blocks in 64 KiB pieces, whatever the format, without one.
"""

from __future__ import annotations

import mmap
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from common import Report, Row, Spread, parser, spread
from numpy.typing import NDArray

from lmcache.layout import Declared, Layout, Part, TensorSpec, layer_group
from lmcache.transfer import _native

MIB = 1 << 20
LAYERS, BLOCK_TOKENS, HEADS, HEAD_SIZE, ITEM_BYTES, CHUNK_TOKENS = 8, 16, 8, 128, 2, 256
PAGE_BYTES = 2 * BLOCK_TOKENS * HEADS * HEAD_SIZE * ITEM_BYTES
CHUNK_BYTES = LAYERS * PAGE_BYTES * CHUNK_TOKENS // BLOCK_TOKENS

FORMATS = {
    "K|V fused, NHD": ("NHD", "NB BS NH CS"),
    "K|V fused, HND": ("HND", "NB NH BS CS"),
    "K, V apart, NHD": ("NHD", "2 NB BS NH HS"),
    "K, V apart, HND": ("HND", "2 NB NH BS HS"),
}
"""Dimensions of a layer's tensor, outermost first."""

Bytes = NDArray[np.uint8]


def layout_of(engine: Bytes, num_blocks: int, order: str, axes: str, device: str) -> Layout:
    """Canonical where the device is "cuda" (what is then known of a block is true of these blocks, too), else raw."""
    sizes = {
        "2": 2,
        "NB": num_blocks,
        "BS": BLOCK_TOKENS,
        "NH": HEADS,
        "HS": HEAD_SIZE,
        "CS": 2 * HEAD_SIZE,
    }
    shape = tuple(sizes[word] for word in axes.split())
    strides = tuple(int(np.prod(shape[dim + 1 :])) for dim in range(len(shape)))
    first = TensorSpec("layer", shape, strides, ITEM_BYTES, engine.ctypes.data, "bfloat16")
    step = num_blocks * PAGE_BYTES
    tensors = [replace(first, address=first.address + layer * step) for layer in range(LAYERS)]
    facts = Declared(
        engine="vllm",
        attention_backend="FLASH_ATTN",
        device=device,
        kind="attention",
        num_blocks=num_blocks,
        block_tokens=BLOCK_TOKENS,
        num_heads=HEADS,
        head_size=HEAD_SIZE,
        dtype="bfloat16",
        order=order,
    )
    return Layout((layer_group([Part(facts, tensors)]),))


class Case:
    """One layout over an engine's memory, and a plan that moves all of it."""

    def __init__(self, layout: Layout, pool: Bytes, table: list[int]) -> None:
        self.pool = pool
        self.planes, self.groups = layout.plane_table(), layout.group_table(CHUNK_TOKENS)
        num_chunks = pool.size // CHUNK_BYTES
        self.blocks = np.array(table, np.int64).reshape(num_chunks, -1)
        self.offsets = np.arange(num_chunks, dtype=np.uint64) * np.uint64(CHUNK_BYTES)
        self.seeds = np.arange(num_chunks, dtype=np.uint64)
        self.checksums = b""
        self.store()

    def store(self) -> None:
        """Verified copy into the pool."""
        self.checksums = _native.store(self.pool, self.planes, self.groups, self.blocks, self.offsets, self.seeds, 1)

    def retrieve(self) -> None:
        """Verified copy out of the pool."""
        verdicts = _native.retrieve(
            self.pool, self.planes, self.groups, self.blocks, self.offsets, self.seeds, self.checksums, 1
        )
        if 0 in verdicts:
            raise RuntimeError("a chunk failed its check")


def seconds(work: Callable[[], object]) -> float:
    """How long it takes, once."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(
    plain: Callable[[], object], raw: Case, canonical: Case, verb: str, rounds: int
) -> tuple[dict[str, Spread], float]:
    """GB/s (10**9 bytes) of the three, and the median of the ratios of canonical and raw, round by round."""
    times = []
    for _ in range(rounds + 1):
        turn = [seconds(plain)]
        for case in (raw, canonical):
            if verb == "retrieve":
                case.store()  # the pool holds one of the forms at a time
            turn.append(seconds(case.store if verb == "store" else case.retrieve))
        times.append(turn)
    times = times[1:]
    gigabytes = raw.pool.size / 1e9
    columns = dict(zip(("memcpy", "raw", "ours"), zip(*times, strict=True), strict=True))
    figures = {name: spread([gigabytes / taken for taken in columns[name]]) for name in ("ours", "raw", "memcpy")}
    return figures, statistics.median(turn[1] / turn[2] for turn in times)


def run(total_bytes: int, rounds: int, report: Report) -> None:
    """Every format, both ways."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(total_bytes)
        pool = np.frombuffer(mmap.mmap(file.fileno(), total_bytes), np.uint8)
        pool[:] = 1
        engine = np.frombuffer(mmap.mmap(-1, total_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        engine[:] = np.resize(np.random.default_rng(0).integers(0, 256, 9973, np.uint8), total_bytes)
        num_blocks = total_bytes // (LAYERS * PAGE_BYTES)
        table = list(range(num_blocks))
        random.Random(0).shuffle(table)
        pages = engine.reshape(-1, PAGE_BYTES), pool.reshape(-1, PAGE_BYTES)
        order = np.random.default_rng(1).permutation(len(pages[0]))
        print(f"{_native.features()}, {total_bytes // MIB} MiB, {rounds} rounds, one thread")
        for verb in ("store", "retrieve"):
            source, target = pages if verb == "store" else pages[::-1]
            for name, (tokens, axes) in FORMATS.items():
                raw = Case(layout_of(engine, num_blocks, tokens, axes, "cpu"), pool, table)
                canonical = Case(layout_of(engine, num_blocks, tokens, axes, "cuda"), pool, table)

                def plain(source: Bytes = source, target: Bytes = target) -> None:
                    np.take(source, order, axis=0, out=target, mode="clip")

                figures, ratio = measure(plain, raw, canonical, verb, rounds)
                report.add(Row(f"canonical {verb}, {name}", "GB/s", figures, ratio, "ours / raw, round by round"))


def main() -> int:
    """Print the rows."""
    options = parser(__doc__)
    options.add_argument("--total-mib", type=int, default=256, help="bytes moved by each copy (default 256)")
    options.add_argument("--rounds", type=int, default=9, help="turns of each format (default 9)")
    args = options.parse_args()
    if args.total_mib * MIB % CHUNK_BYTES or args.total_mib < 1 or args.rounds < 1:
        options.error(f"--total-mib must be a multiple of {CHUNK_BYTES // MIB} and --rounds at least 1")
    report = Report()
    run(args.total_mib * MIB, args.rounds, report)
    return report.end(args.json, {"features": _native.features()})


if __name__ == "__main__":
    sys.exit(main())
