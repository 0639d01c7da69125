"""How much memory a server's index takes for each chunk that it holds.

    python benchmarks/index_bytes.py [--json PATH] [--upstream PYTHON] [--entries 1000000]

Ours: private memory of a real core process (``Private_*`` of smaps_rollup), before and after it is made to hold a
million chunks of one rank. That is all it keeps in memory of its own for a chunk: the dictionary from key to entry with
the keys, the arrays of entries and slots, the books of extents, the order of eviction, and what malloc wastes. Apart
from it stands the records file, 128 bytes a chunk of shared memory, which a restarted server finds again; a row tells
what it takes. The KV bytes themselves are in neither. The server has small extents (``clients.DenseServer``).

Upstream (lmcache 0.5.6): growth of its server's private memory by as many chunks of 8 KiB as it can be given in a few
seconds, its L1 being in memory from the start; once as it is shipped, with its log of KV events, once without.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import clients
import common
import upstream

from lmcache.cache.opening import SHARED_MEMORY
from lmcache.keys import KEY_BYTES

BOUND_BYTES = 300.0
FEW = 1000
SHAPE = upstream.KvShape(num_layers=1, token_bytes=32, num_tokens=128 * 1024)
UPSTREAM_STORES, UPSTREAM_GB = 40, 0.5
VARIANTS = {"upstream": (), "upstream, no event log": ("--kv-event-log-size", "0")}


def private_bytes(pid: int) -> int:
    """Memory that is this process's alone."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Private_"))


def records_bytes(instance: int) -> int:
    """Shared memory of the records file of the server on this port."""
    (path,) = Path(SHARED_MEMORY).glob(f"lmcache-*/{instance}/records")
    return path.stat().st_blocks * 512


def ours(entries: int) -> tuple[float, float]:
    """Bytes an entry: of the core's memory, of the records file."""
    with tempfile.TemporaryDirectory() as name, clients.DenseServer(Path(name), entries) as server:
        server.wait_allocated()
        link, line = clients.attached(server.port, "worker")
        source = random.Random(0)
        clients.hold(line, [source.randbytes(KEY_BYTES) for _ in range(FEW)])
        before, records_before = private_bytes(server.process.pid), records_bytes(server.port)
        clients.hold(line, [source.randbytes(KEY_BYTES) for _ in range(entries - FEW)])
        held = server.status()["storage_manager"]["l1_manager"]["total_object_count"]
        if held != entries:
            raise RuntimeError(f"the server holds {held} chunks, not {entries}")
        grown = private_bytes(server.process.pid) - before
        records_grown = records_bytes(server.port) - records_before
        link.close()
        line.client.close()
    return grown / (entries - FEW), records_grown / (entries - FEW)


def theirs(python: str, options: tuple[str, ...]) -> float:
    """Bytes an entry of upstream's server."""
    with (
        tempfile.TemporaryDirectory() as name,
        upstream.Upstream(Path(name), python, UPSTREAM_GB, "lmcache_driven", options) as server,
        upstream.Agents(server, SHAPE) as (agent,),
    ):
        per_store = SHAPE.num_tokens // agent.chunk_tokens
        agent.ask("store_visible", seed=0, num_tokens=SHAPE.num_tokens)
        before = private_bytes(server.process.pid)
        for seed in range(1, UPSTREAM_STORES + 1):
            answer = agent.ask("store_visible", seed=seed, num_tokens=SHAPE.num_tokens)
            if answer["visible_s"] is None:
                raise RuntimeError("upstream did not keep what it was given")
        return (private_bytes(server.process.pid) - before) / (UPSTREAM_STORES * per_store)


def main() -> int:
    """Exit 1 when the bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--upstream", metavar="PYTHON", help="python of an environment with lmcache 0.5.6")
    parser.add_argument("--entries", type=int, default=1_000_000, help="chunks that ours is made to hold")
    args = parser.parse_args()
    if args.entries < 10 * FEW:
        parser.error(f"--entries is {10 * FEW} or more")
    report = common.Report()
    grown, records = ours(args.entries)
    figures = {"ours": common.spread([grown])}
    if args.upstream:
        for name, options in VARIANTS.items():
            figures[name] = common.spread([theirs(args.upstream, options)])
    report.add(common.Row("index, bytes an entry", "B", figures, grown, "ours", BOUND_BYTES))
    report.add(common.Row("records file, bytes an entry", "B", {"ours": common.spread([records])}))
    return report.end(args.json, {"entries": args.entries})


if __name__ == "__main__":
    sys.exit(main())
