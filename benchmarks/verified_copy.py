"""Verified copy against plain memcpy, into the pool and out of it: how much does it cost to check every byte?

    python benchmarks/verified_copy.py [--json PATH] [--total-mib 256] [--rounds 7]

Both sides move the same fragments between anonymous memory and the same MAP_SHARED tmpfs file; everything is touched
beforehand. Fragments are blocks of one run each, in a shuffled order ("blocks"), or the (token, head, K|V) runs of
shuffled blocks that lie in memory as [K|V][head][token] ("heads": the canonical form of an engine of the other order).
The rounds alternate between the two sides, so a busy neighbour slows both. memcpy is numpy's ``take``: one C loop with
a memcpy a fragment, and no checksum; ours copies as much and takes or compares a 64-bit checksum of every chunk.
"""

from __future__ import annotations

import mmap
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from common import Report, Row, Spread, parser, spread
from numpy.typing import NDArray

from lmcache.transfer import _native

KIB = 1 << 10
MIB = 1 << 20
CHUNK_BYTES = 4 * MIB
BLOCKS_BYTES = (256, 512, KIB, 4 * KIB, 16 * KIB, 64 * KIB, 256 * KIB, MIB)
HEADS_BYTES = (256, 512, KIB, 4 * KIB)
THREADS = (1, 2)
BOUNDS = {"store": 1.3, "retrieve": 1.0}  # least ratio to memcpy of one thread, at 64 KiB and more
SMALL_BOUNDS = {KIB: 0.7, 4 * KIB: 0.9}  # both ways
PARTS, HEADS, TOKENS, LAYERS = 2, 4, 16, 2
"""Of one block in "heads": K and V, heads, tokens; and planes."""

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]


class Case:
    """One shape: an engine's memory, a pool, and a plan that moves all of it.

    Args:
        planes: rows of the native table without their address: where in the engine's memory each begins comes first.
        order: the fragments of the engine's memory in the order of the pool's.
    """

    def __init__(
        self, engine: Bytes, pool: Bytes, fragment_bytes: int, planes: list[list[int]], num_blocks: int, order: Numbers
    ) -> None:
        self.engine = engine.reshape(-1, fragment_bytes)
        self.pool_bytes = pool
        self.pool = pool.reshape(-1, fragment_bytes)
        self.order = order
        self.inverse = np.argsort(order)
        num_chunks = engine.size // CHUNK_BYTES
        self.blocks = shuffled(num_blocks).reshape(num_chunks, -1)
        self.planes = np.array([[engine.ctypes.data + row[0], *row[1:]] for row in planes], np.uint64)
        self.groups = np.array([[len(planes), num_blocks, num_blocks // num_chunks]], np.uint64)
        self.offsets = np.arange(num_chunks, dtype=np.uint64) * np.uint64(CHUNK_BYTES)
        self.seeds = np.arange(num_chunks, dtype=np.uint64)
        self.checksums = b""

    def store(self, threads: int) -> None:
        """Verified copy into the pool."""
        self.checksums = _native.store(
            self.pool_bytes, self.planes, self.groups, self.blocks, self.offsets, self.seeds, threads
        )

    def retrieve(self, threads: int) -> None:
        """Verified copy out of the pool."""
        verdicts = _native.retrieve(
            self.pool_bytes, self.planes, self.groups, self.blocks, self.offsets, self.seeds, self.checksums, threads
        )
        if 0 in verdicts:
            raise RuntimeError("a chunk failed its check")

    def memcpy_in(self, threads: int) -> None:
        """Plain copy into the pool."""
        _take(self.engine, self.order, self.pool, threads)

    def memcpy_out(self, threads: int) -> None:
        """Plain copy out of the pool."""
        _take(self.pool, self.inverse, self.engine, threads)


def shuffled(count: int) -> Numbers:
    """0 to ``count`` - 1 in an order that is the same every time."""
    order = list(range(count))
    random.Random(count).shuffle(order)
    return np.array(order, np.int64)


def blocks_case(engine: Bytes, pool: Bytes, fragment_bytes: int) -> Case:
    """One plane of blocks of one run."""
    num_blocks = engine.size // fragment_bytes
    plane = [0, fragment_bytes, 1, 0, 1, 0, 1, 0, fragment_bytes]
    return Case(engine, pool, fragment_bytes, [plane], num_blocks, shuffled(num_blocks))


def heads_case(engine: Bytes, pool: Bytes, fragment_bytes: int) -> Case:
    """Planes of blocks that lie as [K|V][head][token], and are stored as [token][head][K|V]."""
    block_fragments = PARTS * HEADS * TOKENS
    num_blocks = engine.size // fragment_bytes // block_fragments // LAYERS
    num_chunks = engine.size // CHUNK_BYTES
    dims = [TOKENS, fragment_bytes, HEADS, TOKENS * fragment_bytes, PARTS, HEADS * TOKENS * fragment_bytes]
    block_bytes = block_fragments * fragment_bytes
    planes = [[layer * num_blocks * block_bytes, block_bytes, *dims, fragment_bytes] for layer in range(LAYERS)]
    numbers = np.arange(engine.size // fragment_bytes).reshape(LAYERS, num_blocks, PARTS, HEADS, TOKENS)
    chunks = numbers[:, shuffled(num_blocks)].reshape(LAYERS, num_chunks, -1, PARTS, HEADS, TOKENS)
    order = np.ascontiguousarray(chunks.transpose(1, 0, 2, 5, 4, 3)).reshape(-1)
    return Case(engine, pool, fragment_bytes, planes, num_blocks, order)


def _take(source: Bytes, rows: Numbers, target: Bytes, threads: int) -> None:
    def part(index: int) -> None:
        share = slice(index * len(rows) // threads, (index + 1) * len(rows) // threads)
        np.take(source, rows[share], axis=0, out=target[share], mode="clip")

    if threads == 1:
        part(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(part, range(threads)))


def _seconds(work: Callable[[int], None], threads: int) -> float:
    start = time.perf_counter()
    work(threads)
    return time.perf_counter() - start


def measure(case: Case, verb: str, threads: int, rounds: int) -> tuple[dict[str, Spread], float]:
    """GB/s (10**9 bytes) of both, and the median of the ratios of neighbouring rounds."""
    plain, verified = (case.memcpy_in, case.store) if verb == "store" else (case.memcpy_out, case.retrieve)
    for warm_up in (plain, verified):
        warm_up(threads)
    times = [(_seconds(plain, threads), _seconds(verified, threads)) for _ in range(rounds)]
    gigabytes = case.engine.size / 1e9
    figures = {
        "ours": spread([gigabytes / pair[1] for pair in times]),
        "memcpy": spread([gigabytes / pair[0] for pair in times]),
    }
    return figures, statistics.median(pair[0] / pair[1] for pair in times)


def check_same(case: Case) -> None:
    """Stop where the two sides do not move the same fragments to the same places."""
    case.store(1)
    stored = case.pool_bytes.copy()
    case.memcpy_in(1)
    if not np.array_equal(stored, case.pool_bytes):
        raise RuntimeError("the two sides copy different bytes")


def run(total_bytes: int, rounds: int, report: Report) -> None:
    """Every case."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(total_bytes)
        pool = np.frombuffer(mmap.mmap(file.fileno(), total_bytes), np.uint8)
        pool[:] = 1
        engine = np.frombuffer(mmap.mmap(-1, total_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        engine[:] = np.resize(np.random.default_rng(0).integers(0, 256, 9973, np.uint8), total_bytes)
        print(f"{_native.features()}, {total_bytes // MIB} MiB, {rounds} rounds")
        for shape, sizes, make in (("blocks", BLOCKS_BYTES, blocks_case), ("heads", HEADS_BYTES, heads_case)):
            for fragment_bytes in sizes:
                case = make(engine, pool, fragment_bytes)
                check_same(case)
                for verb in BOUNDS:
                    for threads in THREADS:
                        report.add(row(case, shape, verb, fragment_bytes, threads, rounds))


def row(case: Case, shape: str, verb: str, fragment_bytes: int, threads: int, rounds: int) -> Row:
    """One line. Bounds are for one thread."""
    figures, ratio = measure(case, verb, threads, rounds)
    bound = SMALL_BOUNDS.get(fragment_bytes, BOUNDS[verb] if fragment_bytes >= 64 * KIB else None)
    unit, name = next(one for one in ((MIB, "MiB"), (KIB, "KiB"), (1, "B")) if fragment_bytes >= one[0])
    size = f"{fragment_bytes // unit} {name}"
    title = f"{verb} {shape} of {size}, {threads} thread{'s' if threads > 1 else ''}"
    says, judged = "ours / memcpy, round by round", bound if threads == 1 else None
    return Row(title, "GB/s", figures, ratio, says, judged, at_least=True)


def main() -> int:
    """Exit 1 when a bound is missed."""
    options = parser(__doc__)
    options.add_argument("--total-mib", type=int, default=256, help="bytes moved by each copy (default 256)")
    options.add_argument("--rounds", type=int, default=7, help="alternations a case (default 7)")
    args = options.parse_args()
    if args.total_mib < 4 or args.total_mib % 4 or args.rounds < 1:
        options.error("--total-mib must be a multiple of 4 and --rounds at least 1")
    report = Report()
    run(args.total_mib * MIB, args.rounds, report)
    return report.end(args.json, {"features": _native.features()})


if __name__ == "__main__":
    sys.exit(main())
