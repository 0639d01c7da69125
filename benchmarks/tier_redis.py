"""The redis tier against redis-benchmark, on one Redis server, value sizes taking turns.

    python benchmarks/tier_redis.py [--json PATH] [--rounds 3]

For each size both run in turns inside one run: `redis-benchmark -c 1 -P 1 -t set,get -d SIZE`, the tier with one
connection, one call at a time, and the tier as it comes (its own number of connections, as many calls at a time). The
tier is called as the cascade calls it, from an event loop with parts that lie in memory; what it gets is compared once.
Memory is that of the whole value; GB are 10**9 bytes. Bound: 0.8 of redis-benchmark with one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from hashlib import sha256
from pathlib import Path

from common import Report, Row, free_port, parser, spread, stop

from lmcache.tiers import make_tier, objects
from lmcache.tiers.base import Share, Tier

KIB = 1 << 10
SIZES_BYTES = (8 << 20, 1 << 20, 256 * KIB)
MOVED_BYTES = 256 << 20  # by each of them, in each verb and round
BOUND = 0.8
SHARE = Share(bytes(16))
START_S = 30.0

Object = tuple[bytes, list[memoryview]]


@contextlib.contextmanager
def redis_server(folder: Path) -> Iterator[int]:
    """The port of a server of its own, without persistence."""
    port = free_port()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while subprocess.run(["redis-cli", "-p", str(port), "ping"], capture_output=True).stdout != b"PONG\n":
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((folder / "server.log").read_text(errors="replace"))
            time.sleep(0.02)
        yield port
    finally:
        stop(process)


def made(name: int, num_bytes: int) -> Object:
    """An object of that length: a header page and one extent."""
    key = sha256(b"%d" % name).digest()
    header = objects.encode(objects.Header(key, bytes(16), bytes(16), bytes(8), num_bytes - objects.PAGE_BYTES, (0,)))
    memory = memoryview(mmap.mmap(-1, num_bytes))
    memory[:] = os.urandom(num_bytes)
    memory[: len(header)] = header
    return key, [memory[: len(header)], memory[len(header) :]]


def theirs(port: int, num_bytes: int, calls: int) -> dict[str, float]:
    """Calls a second of redis-benchmark, by verb."""
    command = ["redis-benchmark", "-p", str(port), "-c", "1", "-P", "1", "-t", "set,get", "-d", str(num_bytes)]
    done = subprocess.run([*command, "-n", str(calls), "--csv"], capture_output=True, text=True, check=True)
    return {row["test"].lower(): float(row["rps"]) for row in csv.DictReader(done.stdout.splitlines())}


async def calls_per_s(calls: int, at_once: int, call: Callable[[int], Awaitable[bool]]) -> float:
    """Calls a second, ``at_once`` of them at a time."""
    waiting = iter(range(calls))

    async def go_on(worker: int) -> None:
        for _ in waiting:
            if not await call(worker):
                raise RuntimeError("the tier answered False")

    start = time.perf_counter()
    await asyncio.gather(*(go_on(worker) for worker in range(at_once)))
    return calls / (time.perf_counter() - start)


async def ours(tier: Tier, kept: list[Object], calls: int, at_once: int) -> dict[str, float]:
    """Calls a second of the tier, by verb; each of the calls at a time has its own object and its own memory."""

    async def put(worker: int) -> bool:
        key, parts = kept[worker]
        return await tier.put(key, parts, SHARE)

    async def get(worker: int) -> bool:
        key, parts = kept[worker]
        return await tier.get(key, parts)

    return {"set": await calls_per_s(calls, at_once, put), "get": await calls_per_s(calls, at_once, get)}


async def check(tier: Tier, one: Object) -> None:
    """What was put is what comes back."""
    key, parts = one
    before = [bytes(part) for part in parts]
    for part in parts:
        part[:] = bytes(len(part))
    if not await tier.get(key, parts) or [bytes(part) for part in parts] != before:
        raise RuntimeError("other bytes came back")


async def measure(port: int, rounds: int, report: Report) -> None:
    """A row for each size and verb."""
    tier = make_tier({"type": "redis", "port": port})
    alone = make_tier({"type": "redis", "port": port, "connections": 1})
    await tier.open()
    await alone.open()
    for num_bytes in SIZES_BYTES:
        kept = [made(index, num_bytes) for index in range(tier.concurrency)]
        calls = MOVED_BYTES // num_bytes
        taken: dict[str, list[dict[str, float]]] = {"redis-benchmark": [], "tier, 1 connection": [], "tier": []}
        for turn in range(rounds + 1):
            turns = {
                "redis-benchmark": theirs(port, num_bytes, calls),
                "tier, 1 connection": await ours(alone, kept[:1], calls, 1),
                "tier": await ours(tier, kept, calls, tier.concurrency),
            }
            if turn:  # the first warms up
                for name, speeds in turns.items():
                    taken[name].append(speeds)
        await check(tier, kept[0])
        for verb in ("set", "get"):
            pairs = zip(taken["tier, 1 connection"], taken["redis-benchmark"], strict=True)
            ratio = statistics.median(mine[verb] / other[verb] for mine, other in pairs)
            gb_per_s = {name: spread([each[verb] for each in all_], num_bytes / 1e9) for name, all_ in taken.items()}
            figures = {
                "ours": gb_per_s["tier, 1 connection"],
                "redis-benchmark": gb_per_s["redis-benchmark"],
                f"ours with {tier.concurrency} connections": gb_per_s["tier"],
            }
            size = f"{num_bytes >> 20} MiB" if num_bytes >> 20 else f"{num_bytes // KIB} KiB"
            says = "ours / redis-benchmark, round by round"
            title = f"redis tier, {verb} {size}, 1 connection"
            report.add(Row(title, "GB/s", figures, ratio, says, BOUND, at_least=True))
    await alone.close()
    await tier.close()


def main() -> int:
    """Exit 1 when a bound is missed."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=3, help="turns of each (default 3)")
    args = options.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as port:
        asyncio.run(measure(port, args.rounds, report))
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
