"""The mooncake tier against the Mooncake library called directly, on one master and one node, taking turns.

    python benchmarks/tier_mooncake.py [--json PATH] [--rounds 3]

Master and node are processes of their own on loopback, protocol TCP. Directly means: a client of its own, `put_from`
and `get_into` of one registered buffer an object. The tier is called as the cascade calls it, from an event loop with
parts that lie in memory (a header page and one extent). Both store new keys and remove them between the rounds, and
both move one object at a time, and as many at once as the tier likes (the library from so many threads). GB are 10**9
bytes. Bound: 0.8 of the library where both move as many at once as the cascade asks of the tier; one at a time is told
beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import Report, Row, free_port, parser, spread, stop

from lmcache.tiers import make_tier, objects
from lmcache.tiers.base import Share, Tier

MIB = 1 << 20
EXTENTS_BYTES = (1 * MIB, 4 * MIB, 16 * MIB)
MOVED_BYTES = 128 * MIB  # by each of them, in each verb and round
SEGMENT_BYTES = 2 << 30
BOUND = 0.8
SHARE = Share(bytes(16))
START_S = 30.0
NODE = f"""
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
store.setup("127.0.0.1", "P2PHANDSHAKE", {SEGMENT_BYTES}, 16 << 20, "tcp", "", sys.argv[1])
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def mooncake() -> Iterator[str]:
    """The address of a master with one node."""
    spec = importlib.util.find_spec("mooncake")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package mooncake-transfer-engine-non-cuda is not installed")
    port, metrics_port = free_port(), free_port()
    address = f"127.0.0.1:{port}"
    command = [str(Path(spec.origin).parent / "mooncake_master"), "--rpc_address=127.0.0.1", f"--rpc_port={port}"]
    command += ["--metrics_host=127.0.0.1", f"--metrics_port={metrics_port}", "--logtostderr"]
    with contextlib.ExitStack() as stack:
        master = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(stop, master)
        time.sleep(1.0)
        pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL  # the library says at each start what it has detected
        node = subprocess.Popen([sys.executable, "-c", NODE, address], stdin=pipe, stdout=pipe, stderr=nowhere)
        stack.callback(stop, node)
        if node.stdout is None or node.stdout.readline() != b"ready\n":
            raise RuntimeError("the node did not start")
        yield address


class Direct:
    """The library without us."""

    def __init__(self, address: str, memory: memoryview, each: int) -> None:
        from mooncake.store import MooncakeDistributedStore

        self.store = MooncakeDistributedStore()
        if self.store.setup("127.0.0.1", "P2PHANDSHAKE", 0, 16 * MIB, "tcp", "", address):
            raise RuntimeError("the store cannot be joined")
        self.each = each
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.store.register_buffer(self.address, memory.nbytes)

    def put(self, index: int) -> None:
        """One object."""
        if self.store.put_from(f"direct-{index}", self.address + index * self.each, self.each):
            raise RuntimeError("the library failed")

    def get(self, index: int) -> None:
        """One object."""
        if self.store.get_into(f"direct-{index}", self.address + index * self.each, self.each) != self.each:
            raise RuntimeError("the library failed")


def made(index: int, memory: memoryview) -> tuple[bytes, list[memoryview]]:
    """An object in that memory: a header page and one extent."""
    key = index.to_bytes(32, "big")
    extent_bytes = memory.nbytes - objects.PAGE_BYTES
    header = objects.encode(objects.Header(key, bytes(16), bytes(16), bytes(8), extent_bytes, (0,)))
    memory[: objects.PAGE_BYTES] = header
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

    taken = {"put": await seconds(len(kept), at_once, put), "get": await seconds(len(kept), at_once, get)}
    await tier.delete([key for key, _ in kept])
    return taken


def theirs(direct: Direct, count: int, at_once: int) -> dict[str, float]:
    """Seconds of the library, by verb; from so many threads, or this one alone."""
    taken = {}
    with ThreadPoolExecutor(at_once) as threads:
        for verb, move in (("put", direct.put), ("get", direct.get)):
            start = time.perf_counter()
            for _ in map(move, range(count)) if at_once == 1 else threads.map(move, range(count)):
                pass
            taken[verb] = time.perf_counter() - start
    direct.store.batch_remove([f"direct-{index}" for index in range(count)], True)
    return taken


async def check(tier: Tier, one: tuple[bytes, list[memoryview]]) -> None:
    """What was put is what comes back."""
    key, parts = one
    before = [bytes(part) for part in parts]
    await tier.put(key, parts, SHARE)
    for part in parts:
        part[:] = bytes(len(part))
    if not await tier.get(key, parts) or [bytes(part) for part in parts] != before:
        raise RuntimeError("other bytes came back")
    await tier.delete([key])


async def measure(tier: Tier, address: str, extent_bytes: int, rounds: int) -> list[Row]:
    """A row for each verb and number at once."""
    count = MOVED_BYTES // extent_bytes
    each = extent_bytes + objects.PAGE_BYTES
    memory = memoryview(mmap.mmap(-1, each * count))
    memory[:] = os.urandom(each) * count
    kept = [made(index, memory[index * each : (index + 1) * each]) for index in range(count)]
    direct = Direct(address, memory, each)
    taken: dict[int, list[tuple[dict[str, float], dict[str, float]]]] = {1: [], tier.concurrency: []}
    for turn in range(rounds + 1):
        for at_once, pairs in taken.items():
            pair = (theirs(direct, count, at_once), await ours(tier, kept, at_once))
            if turn:  # the first warms up
                pairs.append(pair)
    await check(tier, kept[0])
    direct.store.close()
    rows = []
    for verb in ("put", "get"):
        for at_once, pairs in taken.items():
            figures = {
                "ours": spread([each * count / 1e9 / mine[verb] for _, mine in pairs]),
                "library": spread([each * count / 1e9 / library[verb] for library, _ in pairs]),
            }
            ratio = statistics.median(library[verb] / mine[verb] for library, mine in pairs)
            bound = BOUND if at_once > 1 else None
            title = f"mooncake tier, {verb} {extent_bytes // MIB} MiB, {at_once} at a time"
            rows.append(Row(title, "GB/s", figures, ratio, "ours / library, turn by turn", bound, at_least=True))
    return rows


async def run(rounds: int, report: Report) -> None:
    """All rows."""
    with mooncake() as address:
        tier = make_tier({"type": "mooncake", "master": address})
        await tier.open()
        for extent_bytes in EXTENTS_BYTES:
            for row in await measure(tier, address, extent_bytes, rounds):
                report.add(row)
        await tier.close()


def main() -> int:
    """Exit 1 when a bound is missed."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="turns a size (default 3)")
    args = options.parse_args()
    report = Report()
    asyncio.run(run(args.rounds, report))
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
