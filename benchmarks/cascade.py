"""L1 and the tiers below it: lookups beside tiers, stores at twice a tier's speed, the disk's share, a restart.

    python benchmarks/cascade.py [lookup] [overload] [disk] [restart] [--folder DIR] [--seconds 10] [--json PATH]

lookup: a prompt of 128k tokens that lies wholly in L1, on a server without tiers and on one with a file tier, in turn.
overload: an engine stores at twice the speed of a tier, a real Redis behind a proxy that lets so many bytes a second
through; what L1 refused, what the tier did not get and whether that was counted, and the memory of both processes.
disk: a file tier at 8 MiB a chunk, stored through the cascade and promoted again, in turn with O_DIRECT writes of as
many files of the same length and O_DIRECT reads of the tier's own files, by as many threads as the tier uses.
restart: a server on a folder of 100,000 objects, and on an empty one: first healthy answer, first promoted hit.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import clients
import common
from common import Row
from msgspec.structs import replace
from slow_tier import overload

from lmcache.benchmark.tier_passes import TierRunner
from lmcache.benchmark.tier_server import PrivateServer
from lmcache.connectors.session import SchedulerSession
from lmcache.keys import checksum_seed, extend, namespace
from lmcache.tiers import make_tier
from lmcache.tiers.base import Share
from lmcache.tiers.objects import Header, encode, padded
from lmcache.transfer import _native
from lmcache.transfer._native import pack_tokens
from lmcache.wire.messages import Found, Lookup, Promoting

PARTS = ("lookup", "overload", "disk", "restart")
GB = 1 << 30
ANSWER_S = 30.0

CHUNK_TOKENS = 256
PROMPT_TOKENS, LOOKUP_BLOCK = 131072, 20
SAME_RATIO = 1.05
"""What "costs the same" means: medians of two servers that are the same differ by as much."""

DISK_TOKENS, DISK_TOKEN_BYTES = 32768, 32768  # 128 chunks of 8 MiB
DISK_SHARE = 0.9
OBJECTS, OBJECT_BYTES = 100_000, 4096
RESTART_S = 1.0
PUTS_AT_ONCE = 32


def file_tier(folder: Path, size_gb: float) -> list[str]:
    """The options of a server with a file tier."""
    return ["--l2-path", str(folder), "--l2-size-gb", f"{size_gb:g}"]


# --- lookup -----------------------------------------------------------------------------------------------------------


def measure_lookup(folder: Path, rounds: int, report: common.Report) -> None:
    """A prompt that lies in L1, without and with a tier."""
    parent, source = namespace({"model": "benchmark"}), random.Random(0)
    tokens = [source.randrange(128_000) for _ in range(PROMPT_TOKENS)]

    def keys_of() -> list[bytes]:
        return extend(parent, pack_tokens(tokens), CHUNK_TOKENS)

    keys = keys_of()
    times: dict[str, list[float]] = {"without": [], "with": []}
    with ExitStack() as stack:
        sessions = {}
        for name, options in (("without", []), ("with", file_tier(folder / "lookup", 1.0))):
            server = stack.enter_context(PrivateServer(options, 0.25, CHUNK_TOKENS))
            if options:
                server.wait_tier()
            worker, line = clients.attached(server.port, "worker")
            asker, _ = clients.attached(server.port, "scheduler")
            sessions[name] = SchedulerSession(asker)
            for close in (worker.close, line.client.close, sessions[name].close):
                stack.callback(close)
            clients.hold(line, keys)
            if options:
                wait_until(lambda server=server: server.counts().puts >= len(keys))
        for index in range(-1, -(-rounds // LOOKUP_BLOCK)):
            for name in sorted(sessions, reverse=bool(index % 2)):
                block = [clients.answered(sessions[name], keys_of, len(keys)) for _ in range(LOOKUP_BLOCK)]
                times[name] += block if index >= 0 else []
    spreads = {name: common.spread(values, 1e6) for name, values in times.items()}
    figures = {"ours": spreads["with"], "without a tier": spreads["without"]}
    ratio = spreads["with"]["median"] / spreads["without"]["median"]
    title = f"lookup, {PROMPT_TOKENS:,} tokens in L1, file tier"
    report.add(Row(title, "us", figures, ratio, "ours / without a tier", SAME_RATIO))


# --- disk -------------------------------------------------------------------------------------------------------------


def raw_write(folder: Path, num_files: int, num_bytes: int, threads: int) -> float:
    """Seconds to write new files with O_DIRECT; they are removed afterwards, untimed."""
    folder.mkdir()
    data = mmap.mmap(-1, num_bytes)
    data.write(random.Random(0).randbytes(num_bytes))

    def one(number: int) -> None:
        fd = os.open(folder / str(number), os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600)
        try:
            if os.write(fd, data) != num_bytes:
                raise OSError("a short write")
        finally:
            os.close(fd)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(int, range(threads)))
        started = time.perf_counter()
        list(pool.map(one, range(num_files)))
        elapsed_s = time.perf_counter() - started
    shutil.rmtree(folder)
    return elapsed_s


def raw_read(paths: Sequence[Path], num_bytes: int, threads: int) -> float:
    """Seconds to read files with O_DIRECT into memory that exists, a buffer a file."""
    buffers = [memoryview(mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE)) for _ in paths]

    def one(number: int) -> None:
        fd = os.open(paths[number], os.O_RDONLY | os.O_DIRECT)
        try:
            if os.readv(fd, [buffers[number]]) != num_bytes:
                raise OSError("a short read")
        finally:
            os.close(fd)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(int, range(threads)))
        started = time.perf_counter()
        list(pool.map(one, range(len(paths))))
        return time.perf_counter() - started


def measure_disk(folder: Path, rounds: int, report: common.Report) -> None:
    """A file tier against the disk itself."""
    place = folder / "disk"
    threads = make_tier({"type": "file", "base_path": str(place), "capacity_gb": 1}).concurrency
    chunk_bytes = CHUNK_TOKENS * DISK_TOKEN_BYTES
    num_files = DISK_TOKENS // CHUNK_TOKENS
    object_bytes = padded(chunk_bytes) + 4096
    rows: dict[str, list[float]] = {"write": [], "raw_write": [], "promote": [], "raw_read": []}
    total_gb = num_files * object_bytes / GB
    with PrivateServer(file_tier(place, (rounds + 2) * total_gb), 2.0, CHUNK_TOKENS) as server:
        server.wait_tier()
        runner = TierRunner(server, DISK_TOKENS, DISK_TOKEN_BYTES)
        known: set[Path] = set()
        for number in range(rounds + 1):
            raw_write_s = raw_write(folder / "raw", num_files, object_bytes, threads)
            runner.measure(1, None)
            if runner.results.num_passes != number + 1:
                raise RuntimeError(f"a pass failed: {runner.results.failures} {runner.results.stuck}")
            found = {path for path in place.rglob("*") if path.is_file() and path.stat().st_size == object_bytes}
            new, known = sorted(found - known), found
            if len(new) != num_files:
                raise RuntimeError(f"{len(new)} new files of {object_bytes} bytes, not {num_files}")
            raw_read_s = raw_read(new, object_bytes, threads)
            if number:  # the first round warms up
                figures = (runner.results.write_s[-1], raw_write_s, runner.results.promote_s[-1], raw_read_s)
                for name, seconds in zip(rows, figures, strict=True):
                    rows[name].append(total_gb / seconds)
        runner.close()
    shutil.rmtree(place)
    for name, raw in (("write", "raw_write"), ("promote", "raw_read")):
        pairs = zip(rows[name], rows[raw], strict=True)  # of one moment: disks that others use vary a lot
        share = common.spread([ours / theirs for ours, theirs in pairs])["median"]
        both = {"ours": common.spread(rows[name]), "bare O_DIRECT": common.spread(rows[raw])}
        title = f"L1 and disk, {name} {num_files} x 8 MiB, {threads} at a time"
        report.add(Row(title, "GiB/s", both, share, "ours / bare, round by round", DISK_SHARE, at_least=True))


# --- restart ----------------------------------------------------------------------------------------------------------


def object_key(number: int) -> bytes:
    """The key of one of the objects."""
    return extend(namespace({"model": "restart"}), number.to_bytes(4, "little"), 1)[0]


async def fill(options: dict[str, object], num_objects: int) -> None:
    """Put objects into a file tier, by its adapter."""
    tier = make_tier(options)
    await tier.open()
    numbers = iter(range(num_objects))

    async def put_some() -> None:
        first, extent = (memoryview(mmap.mmap(-1, 4096)) for _ in range(2))
        for number in numbers:
            key = object_key(number)
            extent[:] = key * (OBJECT_BYTES // len(key))
            checksum = _native.checksum(extent, checksum_seed(key, 0))
            header = Header(key, bytes(16), bytes(16), bytes(8), OBJECT_BYTES, (checksum,))
            first[:] = encode(header)
            if not await tier.put(key, [first, extent], Share(bytes(16))):
                raise RuntimeError("the tier is full")

    await asyncio.gather(*(put_some() for _ in range(PUTS_AT_ONCE)))
    await tier.close()


def start_and_hit(options: Sequence[str], key: bytes | None) -> tuple[float, float]:
    """Seconds from the spawn of a server to its first healthy answer, and to the first promoted hit (0: no key)."""
    server = PrivateServer(options, 0.25, CHUNK_TOKENS)
    started = time.perf_counter()
    try:
        server.start()
        healthy_s = time.perf_counter() - started
        if key is None:
            return healthy_s, 0.0
        link, line = clients.attached(server.port, "worker")
        request = Lookup(0, keys=key, promote=True)
        while not isinstance(reply := line.client.call(request, ANSWER_S), Found) or not reply.num_chunks:
            if time.perf_counter() - started > ANSWER_S:
                raise RuntimeError(f"no hit within {ANSWER_S:g} s")
            number = reply.promotion if isinstance(reply, Promoting) else 0
            request = replace(request, promotion=number)
            time.sleep(0.001)
        hit_s = time.perf_counter() - started
        link.close()
        line.client.close()
        return healthy_s, hit_s
    finally:
        server.close()


def measure_restart(folder: Path, rounds: int, num_objects: int, report: common.Report) -> None:
    """A server that finds many objects, and one that finds none."""
    place, empty = folder / "restart", folder / "empty"
    asyncio.run(fill({"type": "file", "base_path": str(place), "capacity_gb": 8}, num_objects))
    source, rows = random.Random(0), {"healthy": array("d"), "hit": array("d"), "healthy_empty": array("d")}
    for _ in range(rounds):
        healthy_s, hit_s = start_and_hit(file_tier(place, 8), object_key(source.randrange(num_objects)))
        rows["healthy"].append(healthy_s)
        rows["hit"].append(hit_s)
        rows["healthy_empty"].append(start_and_hit(file_tier(empty, 8), None)[0])
    spreads = {name: common.spread(values) for name, values in rows.items()}
    shutil.rmtree(place)
    for name, figures in (
        ("healthy", {"ours": spreads["healthy"], "empty folder": spreads["healthy_empty"]}),
        ("first promoted hit", {"ours": spreads["hit"]}),
    ):
        title = f"restart on {num_objects:,} objects, {name}"
        report.add(Row(title, "s", figures, figures["ours"]["max"], "slowest, s", RESTART_S))


def wait_until(holds: Any) -> None:
    """Return once ``holds()`` is true.

    Raises:
        TimeoutError: not within ``ANSWER_S``.
    """
    deadline = time.monotonic() + ANSWER_S
    while not holds():
        if time.monotonic() >= deadline:
            raise TimeoutError("the tier did not take what was stored")
        time.sleep(0.05)


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--folder", metavar="DIR", help="on the disk to measure; default: the temporary folder")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of disk and restart; lookups are 100 times as many"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to store in overload")
    parser.add_argument("--objects", type=int, default=OBJECTS, help="objects of restart")
    args = parser.parse_args()
    parts = args.parts or list(PARTS)
    if args.rounds < 2 or set(parts) - set(PARTS):
        parser.error(f"--rounds is at least 2, parts are of {', '.join(PARTS)}")
    report, details = common.Report(), {}
    with tempfile.TemporaryDirectory(prefix="cascade-", dir=args.folder) as name:
        folder = Path(name)
        if "lookup" in parts:
            measure_lookup(folder, args.rounds * 100, report)
        if "overload" in parts:
            details["overload"] = overload(folder, args.seconds, report)
        if "disk" in parts:
            measure_disk(folder, args.rounds, report)
        if "restart" in parts:
            measure_restart(folder, args.rounds, args.objects, report)
    return report.end(args.json, details)


if __name__ == "__main__":
    sys.exit(main())
