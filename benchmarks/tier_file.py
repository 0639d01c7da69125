"""The file tier against bare O_DIRECT system calls on the same disk: what does keeping objects cost?

    python benchmarks/tier_file.py [FOLDER] [--json PATH] [--rounds 3] [--objects 100000]

FOLDER is on a disk to be measured (default: the temporary folder); about 1 GB a round is written below it and removed
at the end. In every round the bare calls and the tier take turns, with the same objects from the same shared memory and
as many threads as the tier has calls at a time. The bare side of

    fill   makes a file for each object with open, one pwrite and close
    full   writes the objects over files of the same length that are there
    load   reads such files with open, one pread and close

while the tier fills up; is full, so that each put pushes an object out; and is read. Ratios are medians over rounds.
"""

from __future__ import annotations

import asyncio
import gc
import mmap
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from common import Report, Row, parser, spread

from lmcache.tiers import make_tier, objects
from lmcache.tiers.base import Share, Tier
from lmcache.tiers.objects import PAGE_BYTES, Header

KIB, MIB, GB = 1 << 10, 1 << 20, 1 << 30
ROUND_BYTES = 320 * MIB
SIZES = (8 * MIB, 256 * KIB)
RATIO = 0.9  # least ratio to the bare calls
CONTAINS_US, SERVED_S = 10.0, 1.0  # at most
SMALL_BYTES = 4 * KIB
ANYBODY = Share(bytes(16))
RUNNING_S = 0.2
VERBS = {"fill": "put, room left", "full": "put, full", "load": "get"}


def size_of(num_bytes: int) -> str:
    """A size in words."""
    return f"{num_bytes // MIB} MiB" if num_bytes >= MIB else f"{num_bytes // KIB} KiB"


class Buffers:
    """Objects' memory in a tmpfs file, as L1's: one for each thread."""

    def __init__(self, count: int, extent_bytes: int) -> None:
        self.object_bytes = PAGE_BYTES + extent_bytes
        self.extent_bytes = extent_bytes
        fd = os.memfd_create("buffers")
        os.ftruncate(fd, count * self.object_bytes)
        memory = memoryview(mmap.mmap(fd, count * self.object_bytes))
        os.close(fd)
        memory[:] = secrets.token_bytes(PAGE_BYTES) * (len(memory) // PAGE_BYTES)
        self.all = [memory[at : at + self.object_bytes] for at in range(0, len(memory), self.object_bytes)]

    def header(self, key: bytes) -> bytes:
        """The first page of an object."""
        return objects.encode(Header(key, bytes(16), bytes(16), bytes(8), self.extent_bytes, (0,)))


def bare(buffers: Buffers, paths: Sequence[Path], verb: str) -> float:
    """Seconds of system calls on files, in as many threads as there are buffers."""
    flags = {"fill": os.O_CREAT | os.O_EXCL | os.O_WRONLY, "full": os.O_WRONLY, "load": os.O_RDONLY}[verb] | os.O_DIRECT

    def work(index: int) -> None:
        buffer = buffers.all[index]
        for path in paths[index :: len(buffers.all)]:
            fd = os.open(path, flags, 0o600)
            count = os.preadv(fd, [buffer], 0) if verb == "load" else os.pwrite(fd, buffer, 0)
            os.close(fd)
            if count != len(buffer):
                raise RuntimeError("a short read or write")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(buffers.all))]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


async def through(tier: Tier, buffers: Buffers, keys: Sequence[bytes], verb: str) -> float:
    """Seconds of as many calls of the tier at a time as there are buffers."""
    waiting = iter([(key, b"" if verb == "load" else buffers.header(key)) for key in keys])

    async def work(buffer: memoryview) -> None:
        parts = [buffer[:PAGE_BYTES], buffer[PAGE_BYTES:]]
        for key, header in waiting:
            if verb == "load":
                done = await tier.get(key, parts)
            else:
                parts[0][:] = header
                done = await tier.put(key, parts, ANYBODY)
            if not done:
                raise RuntimeError(f"{verb} was refused: {await tier.usage()}")

    start = time.perf_counter()
    await asyncio.gather(*(work(buffer) for buffer in buffers.all))
    return time.perf_counter() - start


async def throughput(folder: Path, extent_bytes: int, rounds: int) -> list[Row]:
    """One row a verb."""
    count = ROUND_BYTES // extent_bytes
    capacity_gb = rounds * count * (extent_bytes + PAGE_BYTES) / GB
    tier = make_tier({"type": "file", "base_path": str(folder / "tier"), "capacity_gb": capacity_gb + 1e-6})
    buffers = Buffers(tier.concurrency, extent_bytes)
    await tier.open()
    (folder / "bare").mkdir()
    seconds: dict[str, list[tuple[float, float]]] = {"fill": [], "full": [], "load": []}
    kept: list[list[bytes]] = []
    for verb, times in seconds.items():
        for number in range(rounds):
            paths = [folder / "bare" / f"{number}-{index}" for index in range(count)]
            keys = kept[number - rounds] if verb == "load" else [secrets.token_bytes(32) for _ in range(count)]
            turns: list[Callable[[], Any]] = [
                partial(asyncio.to_thread, bare, buffers, paths, verb),
                partial(through, tier, buffers, keys, verb),
            ]
            took = [0.0, 0.0]
            for turn in (0, 1) if number % 2 else (1, 0):
                took[turn] = await turns[turn]()
            times.append((took[0], took[1]))
            if verb != "load":
                kept.append(keys)
    await tier.close()
    gigabytes = count * buffers.object_bytes / 1e9
    return [
        Row(
            f"file tier, {size_of(extent_bytes)}, {VERBS[verb]}, {tier.concurrency} at a time",
            "GB/s",
            {
                "ours": spread([gigabytes / pair[1] for pair in times]),
                "bare O_DIRECT": spread([gigabytes / pair[0] for pair in times]),
            },
            statistics.median(pair[0] / pair[1] for pair in times),
            "ours / bare, round by round",
            RATIO,
            at_least=True,
        )
        for verb, times in seconds.items()
    ]


async def lookups(folder: Path, count: int, rounds: int) -> list[Row]:
    """Opening a folder of many small objects, and asking for them while it is looked through and afterwards."""
    options = {"type": "file", "base_path": str(folder / "small"), "capacity_gb": 64}
    keys = [secrets.token_bytes(32) for _ in range(count)]
    tier = make_tier(options)
    buffers = Buffers(tier.concurrency, SMALL_BYTES)
    await tier.open()
    await through(tier, buffers, keys, "fill")
    await tier.close()

    tier = make_tier(options)
    start = time.perf_counter()
    await tier.open()
    found = await tier.contains(keys[:1000])
    served_s = time.perf_counter() - start
    longest_s = 0.0
    while (await tier.usage()).num_objects != count:
        before = time.perf_counter()
        await asyncio.sleep(0.001)
        longest_s = max(longest_s, time.perf_counter() - before - 0.001)
    scan_s = time.perf_counter() - start
    if not all(found):
        raise RuntimeError("objects that are there were not found")
    await asyncio.sleep(RUNNING_S)
    times = []
    for number in range(rounds):
        some = keys[number * 997 % count :][:10_000]
        before = time.perf_counter()
        sizes = await tier.contains(some)
        times.append((time.perf_counter() - before) / len(some))
        if not all(sizes):
            raise RuntimeError("objects that are there were not found")
    await tier.close()
    figures = {"ours": spread([served_s]), "all looked through": spread([scan_s])}
    waited = f"the event loop waited {longest_s * 1e3:.1f} ms at most meanwhile"
    asked = {"ours": spread(times, 1e6)}
    return [
        Row(f"file tier, {count:,} objects, opened", "s", figures, served_s, "ours, s", SERVED_S, note=waited),
        Row("file tier, lookup of a key", "us", asked, asked["ours"]["median"], "ours, us", CONTAINS_US),
    ]


def main() -> int:
    """Exit 1 when a bound is missed."""
    options = parser(__doc__)
    options.add_argument("folder", type=Path, nargs="?", help="where to write; it must exist")
    options.add_argument("--rounds", type=int, default=3, help="alternations a verb (default 3)")
    options.add_argument("--objects", type=int, default=100_000, help="of the folder that is opened again")
    args = options.parse_args()
    report = Report()
    folder = Path(tempfile.mkdtemp(prefix="tier_file-", dir=args.folder))
    try:
        for extent_bytes in SIZES:
            for row in asyncio.run(throughput(folder, extent_bytes, args.rounds)):
                report.add(row)
            shutil.rmtree(folder)
            folder.mkdir()
            gc.collect()
        for row in asyncio.run(lookups(folder, args.objects, 50)):
            report.add(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
