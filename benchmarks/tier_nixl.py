"""The nixl tier against the NIXL library called directly, with the POSIX backend on one folder, taking turns.

    python benchmarks/tier_nixl.py [--json PATH] [--rounds 3] [--folder FOLDER]

Both write and read objects of the same sizes past the page cache. Directly means: memory and file registered once
beforehand, one descriptor an object, and a loop that asks for the state until it is done. The tier is called as the
cascade calls it, from an event loop with parts that lie in memory; each put brings a new key to a full pool, so it
wipes a header, writes the extent, then the new header. Both move one object at a time, and as many at once as the tier
likes (the library from so many threads). GB are 10**9 bytes. Bound: 0.8 of the library where both move as many at once
as the cascade asks of the tier; one at a time is told beside it.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import importlib.util
import mmap
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from common import Report, Row, parser, spread

from lmcache.tiers import make_tier, objects
from lmcache.tiers.base import Share, Tier

MIB = 1 << 20
EXTENTS_BYTES = (1 * MIB, 4 * MIB, 16 * MIB)
MOVED_BYTES = 128 * MIB  # by each of them, in each verb and round
BOUND = 0.8
SHARE = Share(bytes(16))


class Direct:
    """The library without us."""

    def __init__(self, folder: Path, memory: memoryview, extent_bytes: int, count: int) -> None:
        names = ("nixl", "nixl_cu13", "nixl_cu12")
        nixl = importlib.import_module(next(name for name in names if importlib.util.find_spec(name)))
        strict = nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=strict)
        self.agent = nixl.nixl_agent("direct", config)
        self.agent.create_backend("POSIX", {})
        self.each = extent_bytes + objects.PAGE_BYTES
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.descriptor = os.open(folder / "direct.bin", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        os.posix_fallocate(self.descriptor, 0, self.each * count)
        self.registered = [
            self.agent.register_memory([(self.address, memory.nbytes, 0, "")], "DRAM"),
            self.agent.register_memory([(0, self.each * count, self.descriptor, "")], "FILE"),
        ]

    def move(self, operation: str, index: int) -> None:
        """One object."""
        local = self.agent.get_xfer_descs([(self.address + index * self.each, self.each, 0)], "DRAM")
        remote = self.agent.get_xfer_descs([(index * self.each, self.each, self.descriptor)], "FILE")
        transfer = self.agent.initialize_xfer(operation, local, remote, "direct")
        state = self.agent.transfer(transfer)
        while state == "PROC":
            state = self.agent.check_xfer_state(transfer)
        if state != "DONE":
            raise RuntimeError("the library failed")
        self.agent.release_xfer_handle(transfer)

    def close(self) -> None:
        """Let the file go."""
        for one in self.registered:
            self.agent.deregister_memory(one)
        os.close(self.descriptor)


def made(name: bytes, memory: memoryview) -> tuple[bytes, list[memoryview]]:
    """An object in that memory: a header page and one extent."""
    key = name.rjust(32, b"k")
    extent_bytes = memory.nbytes - objects.PAGE_BYTES
    memory[: objects.PAGE_BYTES] = objects.encode(
        objects.Header(key, bytes(16), bytes(16), bytes(8), extent_bytes, (0,))
    )
    return key, [memory[: objects.PAGE_BYTES], memory[objects.PAGE_BYTES :]]


async def seconds(count: int, at_once: int, call: Callable[[int], Awaitable[bool]]) -> float:
    """Time of so many calls, ``at_once`` of them at a time."""
    waiting = iter(range(count))

    async def go_on() -> None:
        for index in waiting:
            if not await call(index):
                raise RuntimeError("the tier answered False")

    start = time.perf_counter()
    await asyncio.gather(*(go_on() for _ in range(at_once)))
    return time.perf_counter() - start


async def ours(tier: Tier, kept: list[tuple[bytes, list[memoryview]]], at_once: int) -> dict[str, float]:
    """Seconds of the tier, by verb."""

    async def put(index: int) -> bool:
        return await tier.put(*kept[index], SHARE)

    async def get(index: int) -> bool:
        return await tier.get(*kept[index])

    return {"put": await seconds(len(kept), at_once, put), "get": await seconds(len(kept), at_once, get)}


def theirs(direct: Direct, count: int, at_once: int) -> dict[str, float]:
    """Seconds of the library, by verb; from so many threads, or this one alone."""
    taken = {}
    with ThreadPoolExecutor(at_once) as threads:
        for verb, operation in (("put", "WRITE"), ("get", "READ")):
            move = partial(direct.move, operation)
            start = time.perf_counter()
            for _ in map(move, range(count)) if at_once == 1 else threads.map(move, range(count)):
                pass
            taken[verb] = time.perf_counter() - start
    return taken


async def measure(folder: Path, extent_bytes: int, rounds: int) -> list[Row]:
    """A row for each verb."""
    count = MOVED_BYTES // extent_bytes
    each = extent_bytes + objects.PAGE_BYTES
    memory = memoryview(mmap.mmap(-1, each * count))
    memory[:] = os.urandom(each) * count
    direct = Direct(folder, memory, extent_bytes, count)
    tier = make_tier({"type": "nixl", "base_path": str(folder), "pool_size": count, "slot_mb": extent_bytes / MIB})
    await tier.open()
    taken: dict[int, list[tuple[dict[str, float], dict[str, float]]]] = {1: [], tier.concurrency: []}
    for turn in range(rounds + 2):
        for at_once, pairs in taken.items():
            places = (memory[index * each : (index + 1) * each] for index in range(count))
            kept = [made(b"%d %d %d" % (turn, at_once, index), place) for index, place in enumerate(places)]
            pair = (theirs(direct, count, at_once), await ours(tier, kept, at_once))
            if turn > 1:  # the first ones give the files their room
                pairs.append(pair)
    before = bytes(memory)
    memory[:] = bytes(memory.nbytes)
    await ours_back(tier, kept)
    if bytes(memory) != before:
        raise RuntimeError("other bytes came back")
    await tier.close()
    direct.close()
    rows = []
    for verb in ("put", "get"):
        for at_once, pairs in taken.items():
            figures = {
                "ours": spread([each * count / 1e9 / mine[verb] for _, mine in pairs]),
                "library": spread([each * count / 1e9 / library[verb] for library, _ in pairs]),
            }
            ratio = statistics.median(library[verb] / mine[verb] for library, mine in pairs)
            bound = BOUND if at_once > 1 else None
            title = f"nixl tier, {verb} {extent_bytes // MIB} MiB, {at_once} at a time"
            rows.append(Row(title, "GB/s", figures, ratio, "ours / library, turn by turn", bound, at_least=True))
    return rows


async def ours_back(tier: Tier, kept: list[tuple[bytes, list[memoryview]]]) -> None:
    """Read every object into its place."""
    for one in kept:
        if not await tier.get(*one):
            raise RuntimeError("the tier answered False")


def main() -> int:
    """Exit 1 when a bound is missed."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="turns a size (default 3)")
    options.add_argument("--folder", type=Path, help="where the files lie (default: a temporary folder)")
    args = options.parse_args()
    report = Report()
    for extent_bytes in EXTENTS_BYTES:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for row in asyncio.run(measure(Path(folder), extent_bytes, args.rounds)):
                report.add(row)
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
