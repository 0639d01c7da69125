"""Verified copy against plain memcpy, into the pool and out of it: how much does it cost to check every byte?

    python benchmarks/verified_copy.py [--json PATH] [--total-mib 256] [--rounds 9]

Both sides move the same fragments (block-sized pieces of anonymous memory, in a shuffled order) to and from the same
MAP_SHARED tmpfs file; everything is touched beforehand. The rounds alternate between the two, and the table shows
medians of one run, so a busy neighbour slows both. memcpy is numpy's ``take``: one C loop with a memcpy a fragment.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from lmcache.transfer import _native

KIB = 1 << 10
MIB = 1 << 20
CHUNK_BYTES = 4 * MIB
FRAGMENTS_BYTES = (64 * KIB, 256 * KIB, MIB)
THREADS = (1, 2)
BOUNDS = {"store": 1.3, "retrieve": 1.0}  # least ratio to memcpy of one thread

Bytes = NDArray[np.uint8]


class Case:
    """One fragment size: an engine's memory of one segment a block, a pool, and a plan that moves all of it."""

    def __init__(self, engine: Bytes, pool: Bytes, fragment_bytes: int) -> None:
        self.engine = engine.reshape(-1, fragment_bytes)
        self.pool_bytes = pool
        self.pool = pool.reshape(-1, fragment_bytes)
        num_blocks = len(self.engine)
        num_chunks = engine.size // CHUNK_BYTES
        order = list(range(num_blocks))
        random.Random(fragment_bytes).shuffle(order)
        self.order = np.array(order, np.int64)
        self.inverse = np.argsort(self.order)
        self.blocks = self.order.reshape(num_chunks, -1)
        self.segments = np.array([[engine.ctypes.data, fragment_bytes, fragment_bytes]], np.uint64)
        self.offsets = np.arange(num_chunks, dtype=np.uint64) * np.uint64(CHUNK_BYTES)
        self.seeds = np.arange(num_chunks, dtype=np.uint64)
        self.checksums = b""

    def store(self, threads: int) -> None:
        """Verified copy into the pool."""
        self.checksums = _native.store(
            self.pool_bytes, self.segments, len(self.engine), self.blocks, self.offsets, self.seeds, threads
        )

    def retrieve(self, threads: int) -> None:
        """Verified copy out of the pool."""
        verdicts = _native.retrieve(
            self.pool_bytes,
            self.segments,
            len(self.engine),
            self.blocks,
            self.offsets,
            self.seeds,
            self.checksums,
            threads,
        )
        if 0 in verdicts:
            raise RuntimeError("a chunk failed its check")

    def memcpy_in(self, threads: int) -> None:
        """Plain copy into the pool."""
        _take(self.engine, self.order, self.pool, threads)

    def memcpy_out(self, threads: int) -> None:
        """Plain copy out of the pool."""
        _take(self.pool, self.inverse, self.engine, threads)


def _take(source: Bytes, rows: NDArray[np.int64], target: Bytes, threads: int) -> None:
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


def measure(case: Case, verb: str, threads: int, rounds: int) -> dict[str, float]:
    """Median GB/s (10**9 bytes) of both, and the median of the ratios of neighbouring rounds."""
    plain, verified = (case.memcpy_in, case.store) if verb == "store" else (case.memcpy_out, case.retrieve)
    for warm_up in (plain, verified):
        warm_up(threads)
    times = [(_seconds(plain, threads), _seconds(verified, threads)) for _ in range(rounds)]
    gigabytes = case.engine.size / 1e9
    return {
        "memcpy_gb_per_s": gigabytes / statistics.median(pair[0] for pair in times),
        "verified_gb_per_s": gigabytes / statistics.median(pair[1] for pair in times),
        "ratio": statistics.median(pair[0] / pair[1] for pair in times),
    }


def run(total_bytes: int, rounds: int) -> list[dict[str, object]]:
    """Every case; prints a line for each."""
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(total_bytes)
        pool = np.frombuffer(mmap.mmap(file.fileno(), total_bytes), np.uint8)
        pool[:] = 1
        engine = np.frombuffer(mmap.mmap(-1, total_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
        engine[:] = np.resize(np.random.default_rng(0).integers(0, 256, 9973, np.uint8), total_bytes)
        print(f"{_native.features()}, {total_bytes // MIB} MiB, {rounds} rounds")
        print(f"{'':10}{'fragment':>10}{'threads':>9}{'memcpy GB/s':>13}{'verified GB/s':>15}{'ratio':>8}{'bound':>8}")
        for verb in BOUNDS:
            for fragment_bytes in FRAGMENTS_BYTES:
                case = Case(engine, pool, fragment_bytes)
                case.store(1)
                for threads in THREADS:
                    got = measure(case, verb, threads, rounds)
                    bound = BOUNDS[verb] if threads == 1 else None
                    rows.append(
                        {"verb": verb, "fragment_bytes": fragment_bytes, "threads": threads, **got, "bound": bound}
                    )
                    print(
                        f"{verb:10}{fragment_bytes // KIB:>6} KiB{threads:>9}{got['memcpy_gb_per_s']:>13.1f}"
                        f"{got['verified_gb_per_s']:>15.1f}{got['ratio']:>8.2f}{f'>={bound}' if bound else '':>8}"
                    )
    return rows


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description="Verified copy against plain memcpy.")
    parser.add_argument("--json", metavar="PATH", help="write the figures to PATH as well")
    parser.add_argument("--total-mib", type=int, default=256, help="bytes moved by each copy (default 256)")
    parser.add_argument("--rounds", type=int, default=9, help="alternations a case (default 9)")
    args = parser.parse_args()
    if args.total_mib < 4 or args.total_mib % 4 or args.rounds < 1:
        parser.error("--total-mib must be a multiple of 4 and --rounds at least 1")
    rows = run(args.total_mib * MIB, args.rounds)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({"features": _native.features(), "rows": rows}, file, indent=1)
    missed = [row for row in rows if row["bound"] is not None and float(str(row["ratio"])) < float(str(row["bound"]))]
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
