"""The overload of ``cascade.py``: an engine that stores at twice the speed of its server's tier.

    python benchmarks/slow_tier.py PORT TARGET_PORT BYTES_PER_S     (the proxy; ``overload`` starts it)

The tier is a real Redis, whose clients come through a proxy that lets so many bytes a second through, both ways
together and to all connections: what a network of that speed does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common

from lmcache.benchmark.memory import HostMemory, Shape
from lmcache.benchmark.tier_server import PrivateServer
from lmcache.connectors.copier import STORE_THREADS
from lmcache.connectors.link import Address, Line, Link
from lmcache.keys import KEY_BYTES, checksum_seed
from lmcache.transfer.plan import CopyEngine, Plan
from lmcache.wire.messages import GRANTED, Commit, Committed, Found, Granted, Lookup, Register, Reserve

TIER_BYTES_S = 100 << 20
L1_GB = 1.0
CHUNK_TOKENS, TOKEN_BYTES, CHUNKS = 256, 8192, 16  # 2 MiB a chunk, 32 MiB a store
REDIS_MB = 512
ANSWER_S = 10.0
DRAIN_S = 60.0
RSS_BOUND_MB = 64.0
"""How much more memory of its own each process may have than when the tier fell behind."""

SETTLING = 0.2
"""Part of the time after which memory is compared: by then the window of writes is full."""

PIECE_BYTES = 64 << 10


async def throttle(port: int, target: int, bytes_s: int) -> None:
    """Serve until killed."""
    free_at = 0.0

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal free_at
        with contextlib.suppress(OSError):
            while piece := await reader.read(PIECE_BYTES):
                now = time.monotonic()
                free_at = max(free_at, now) + len(piece) / bytes_s
                await asyncio.sleep(max(0.0, free_at - now))
                writer.write(piece)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", target, limit=PIECE_BYTES)
        await asyncio.gather(pump(reader, back), pump(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", port, limit=PIECE_BYTES)
    await server.serve_forever()


@contextlib.contextmanager
def slow_redis(folder: Path) -> Iterator[int]:
    """A Redis that evicts, behind the proxy: the proxy's port."""
    port, target = common.free_port(), common.free_port()
    redis = ["redis-server", "--port", str(target), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    redis += ["--maxmemory", f"{REDIS_MB}mb", "--maxmemory-policy", "allkeys-lru"]
    proxy = [sys.executable, __file__, str(port), str(target), str(TIER_BYTES_S)]
    with (folder / "redis.log").open("wb") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=log) for command in (redis, proxy)]
    try:
        yield port
    finally:
        for process in processes:
            common.stop(process)


class Storer:
    """An engine that stores and looks up what it has stored."""

    def __init__(self, port: int) -> None:
        self._shape = Shape(CHUNKS * CHUNK_TOKENS, TOKEN_BYTES, CHUNK_TOKENS)
        self._memory = HostMemory(self._shape)
        self._engine = CopyEngine(self._memory.layout)
        self._link = Link(Address("tcp://127.0.0.1", port), "benchmark worker", True, self._register)
        self._link.wait_first_try(ANSWER_S)
        if self._link.line is None:
            raise RuntimeError("cannot attach to the server")
        self.line: Line = self._link.line
        self.num_stored = self.num_refused = self.num_untrue = 0
        self.slowest_s = 0.0

    def store(self) -> None:
        """One store of chunks that nobody has; counts what L1 refused, and acknowledgements that were not true."""
        keys = os.urandom(CHUNKS * KEY_BYTES)
        started = time.perf_counter()
        granted = self._call(Reserve(0, keys=keys), Granted)
        chunks = [number for number, state in enumerate(granted.states) if state == GRANTED]
        self.num_refused += CHUNKS - len(chunks)
        if not chunks:
            return
        each = CHUNK_TOKENS // self._shape.block_tokens
        blocks = [number * each + block for number in chunks for block in range(each)]
        offsets = array("Q", granted.offsets)
        named = [keys[number * KEY_BYTES : (number + 1) * KEY_BYTES] for number in chunks]
        seeds = [checksum_seed(key, 0) for key in named]
        plan = Plan.of(self.line.chunk_tokens, blocks, [offsets[number] for number in chunks], seeds)
        assert self.line.pool is not None
        checksums = self._engine.store(self.line.pool, plan, STORE_THREADS)
        num_chunks = self._call(Commit(0, ticket=granted.ticket, checksums=checksums), Committed).num_chunks
        self.slowest_s = max(self.slowest_s, time.perf_counter() - started)
        self.num_stored += num_chunks
        self.num_untrue += abs(num_chunks - self._call(Lookup(0, keys=b"".join(named), lease=False), Found).num_chunks)

    def close(self) -> None:
        """Detach."""
        self._link.close()
        self.line.client.close()
        self._memory.close()

    def _call(self, request: Any, kind: type) -> Any:
        reply = self.line.client.call(request, ANSWER_S)
        if not isinstance(reply, kind):
            raise RuntimeError(f"the server answered {reply}")
        return reply

    def _register(self, chunk_tokens: int) -> Register:
        extent_bytes = chunk_tokens * TOKEN_BYTES
        return Register(0, "worker", "no model", "benchmark", 0, 1, extent_bytes)


def anonymous_mb(pid: int) -> float:
    """Memory of a process that is its own: neither L1 nor files."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    return 0.0


def overload(folder: Path, seconds: float, report: common.Report) -> dict[str, Any]:
    """Store for so long, wait until the tier has had its chance with everything, and draw up the account."""
    with slow_redis(folder) as port:
        adapter = json.dumps({"type": "redis", "host": "127.0.0.1", "port": port})
        with PrivateServer(["--l2-adapter", adapter], L1_GB, CHUNK_TOKENS) as server:
            server.wait_tier()
            service = int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()[0])
            storer = Storer(server.port)
            samples = store_for(storer, seconds, {"core": server.pid, "service": service})
            elapsed_s = float(samples[-1]["at_s"])
            num_at_end = server.counts().settled
            deadline = time.monotonic() + DRAIN_S
            while time.monotonic() < deadline and not is_accounted(storer, server):
                time.sleep(0.1)
            storer.close()
            return account(server, storer, samples, num_at_end / elapsed_s, report)


def store_for(storer: Storer, seconds: float, pids: dict[str, int]) -> list[dict[str, float]]:
    """Store at twice the tier's speed; memory of the processes every second."""
    started, number = time.monotonic(), 0
    samples: list[dict[str, float]] = []
    pause_s = CHUNKS * CHUNK_TOKENS * TOKEN_BYTES / (2 * TIER_BYTES_S)
    while (now := time.monotonic() - started) < seconds:
        if now >= len(samples):
            samples.append({"at_s": now, **{name: anonymous_mb(pid) for name, pid in pids.items()}})
        storer.store()
        number += 1
        time.sleep(max(0.0, started + number * pause_s - time.monotonic()))
    samples.append({"at_s": now, **{name: anonymous_mb(pid) for name, pid in pids.items()}})
    return samples


def is_accounted(storer: Storer, server: PrivateServer) -> bool:
    """Whether every chunk is in the tier, or counted as not."""
    return server.counts().settled + server.metrics()["lost_chunks_total"] >= storer.num_stored


def account(
    server: PrivateServer,
    storer: Storer,
    samples: list[dict[str, float]],
    tier_chunks_s: float,
    report: common.Report,
) -> dict[str, Any]:
    """What became of the chunks."""
    counts, metrics = server.counts(), server.metrics()
    num_lost = int(metrics["lost_chunks_total"])
    silent = storer.num_stored - counts.settled - num_lost
    chunk_mb = CHUNK_TOKENS * TOKEN_BYTES / 2**20
    figures: dict[str, Any] = {
        "stored": storer.num_stored,
        "refused_by_l1": storer.num_refused,
        "untrue_acks": storer.num_untrue,
        "slowest_store_ms": storer.slowest_s * 1e3,
        "in_tier": counts.puts,
        "refused_by_tier": counts.refused_puts,
        "lost_and_counted": num_lost,
        "lost_silently": silent,
        "tier_failures": counts.failures,
        "tier_timeouts": counts.timeouts,
        "stored_mb_s": storer.num_stored * chunk_mb / samples[-1]["at_s"],
        "tier_mb_s": tier_chunks_s * chunk_mb,
        "memory_mb": samples,
    }
    speeds = f"{figures['stored_mb_s']:.0f} MB/s stored, {figures['tier_mb_s']:.0f} MB/s into the tier"
    became = f"{counts.puts} in the tier, {num_lost} evicted unwritten and counted"
    for what, number, note in (
        ("refused by L1", storer.num_refused, speeds),
        ("acknowledged and not there", storer.num_untrue, ""),
        ("lost and not counted", abs(silent), became),
    ):
        said = {"ours": common.spread([number]), "stored": common.spread([storer.num_stored])}
        report.add(common.Row(f"slow tier, chunks {what}", "", said, number, "ours", 0, note=note))
    for name in ("core", "service"):
        column = [sample[name] for sample in samples]
        settled = column[int(len(column) * SETTLING)]
        said = {"ours, at most": common.spread([max(column)]), "settled": common.spread([settled])}
        growth_mb = max(column) - settled
        report.add(common.Row(f"slow tier, memory of the {name}", "MB", said, growth_mb, "growth, MB", RSS_BOUND_MB))
    return figures


if __name__ == "__main__":
    asyncio.run(throttle(*map(int, sys.argv[1:4])))
