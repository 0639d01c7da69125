"""Store at full speed, without end, into a server whose L1 is full and pinned by nobody: is what is acknowledged there?

    python benchmarks/sustained.py [--json PATH] [--seconds 6] [--upstream PYTHON]

One client stores new prompts of 1,024 tokens (chunks of 8 MiB) one after another into 1 GiB of L1, several times what
fits, in two ways that take turns: with a lookup of each prompt, untimed, and without any. Ours: the lookup comes right
after the prompt's ack; and what was acknowledged without any lookup must be held or counted as evicted at the end.
Upstream acknowledges before its chunks can be found, so there a prompt is looked up only when the one behind it has
been acknowledged, too. A chunk that is not found then is lost: its client was told that it is stored.
"""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import mixed_load
from kv_client import Direct
from upstream import Agent, Agents, KvShape, Upstream

L1_GB = 1.0
SHAPE = KvShape(num_layers=32, token_bytes=32 << 10, num_tokens=1024)
CHUNK_TOKENS = 256
SHAPE_CHUNKS = SHAPE.num_tokens // CHUNK_TOKENS
MODES = ("lmcache_driven", "shm")
TURNS = 3


def counters(server: common.Server) -> dict[str, int]:
    """Counters of the server, by name."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=5) as reply:
        found = re.findall(r"^lmcache_mp_(\w+_chunks(?:_total)?) (\S+)$", reply.read().decode(), re.MULTILINE)
    return {name.removesuffix("_total"): int(float(value)) for name, value in found}


class Tally:
    """What became of the stores of one server."""

    def __init__(self) -> None:
        self.turns: list[dict[str, Any]] = []

    def add(self, counts: dict[str, Any]) -> None:
        """The counts of one turn."""
        self.turns.append(counts)

    def total(self, name: str) -> int:
        """One count over all turns."""
        return sum(turn[name] for turn in self.turns)

    @property
    def lost_percent(self) -> list[float]:
        """Of each turn with lookups: chunks that were acknowledged, looked for and not found."""
        looking = [turn for turn in self.turns if turn["looked"]]
        return [100 * (1 - turn["found_chunks"] / (turn["looked"] * SHAPE_CHUNKS)) for turn in looking]

    @property
    def kept(self) -> list[float]:
        """GB/s of each turn with lookups: what was found of what was stored."""
        chunk_bytes = CHUNK_TOKENS * SHAPE.token_bytes
        looking = [turn for turn in self.turns if turn["looked"]]
        return [turn["found_chunks"] * chunk_bytes / turn["storing_s"] / 1e9 for turn in looking]


@contextlib.contextmanager
def upstreams(folder: Path, python: str | None) -> Iterator[dict[str, Agent]]:
    """A client in each mode; none without ``python``."""
    with contextlib.ExitStack() as stack:
        agents: dict[str, Agent] = {}
        for mode in MODES if python else ():
            server = stack.enter_context(Upstream(folder, str(python), L1_GB, mode))
            (agents[mode],) = stack.enter_context(Agents(server, SHAPE, threads=2))
        yield agents


def check_books(before: dict[str, int], after: dict[str, int], acked_chunks: int) -> int:
    """Chunks that are neither held nor counted as evicted, and such as were refused."""
    made = {name: after[name] - before[name] for name in after}
    unaccounted = acked_chunks - made["evicted_chunks"] - made["l1_chunks"]
    return abs(unaccounted) + abs(made["stored_chunks"] - acked_chunks) + made["full_chunks"]


def measure(seconds: float, python: str | None) -> tuple[dict[str, Tally], int]:
    """All turns; the tallies by name ("ours" and upstream's modes), and our chunks that the books do not explain."""
    tallies = {name: Tally() for name in ("ours", *(MODES if python else ()))}
    seed = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        common.Server(Path(folder), L1_GB) as server,
        upstreams(Path(folder), python) as agents,
    ):
        server.wait_allocated()
        client = Direct(server.port, SHAPE)
        before = counters(server)
        for _ in range(TURNS):
            for looks in (True, False):
                seed += 1_000_000
                plan: dict[str, Any] = {
                    "seconds": seconds / TURNS / 2,
                    "num_tokens": SHAPE.num_tokens,
                    "first_seed": seed,
                }
                start_at = time.monotonic()
                behind = 0 if looks else None
                tallies["ours"].add(mixed_load.store_on(client, start_at, looks_behind=behind, **plan))
                for mode, agent in agents.items():
                    behind = 1 if looks else None
                    start_at = time.monotonic()
                    order = {"kind": "store_on", "start_at": start_at, "looks_behind": behind, **plan}
                    tallies[mode].add(agent.ask("load_of", **order))
        strays = check_books(before, counters(server), tallies["ours"].total("acked") * SHAPE_CHUNKS)
        client.close()
    return tallies, strays


def add_rows(report: common.Report, tallies: dict[str, Tally], strays: int) -> None:
    """What was lost, and how fast it went."""
    ours, peers = tallies["ours"], {mode: tallies[mode] for mode in MODES if mode in tallies}
    lost = {mode: common.spread(peer.lost_percent) for mode, peer in peers.items()}
    speeds = {mode: common.spread(peer.kept) for mode, peer in peers.items()}
    best = min(lost, key=lambda mode: lost[mode]["median"], default=None)
    missing = ours.total("looked") * SHAPE_CHUNKS - ours.total("found_chunks")
    bad = float(missing + ours.total("refused") + strays)
    fill = ours.total("acked") * SHAPE.total_bytes / (L1_GB * 2**30)
    note = f"ours: {ours.total('acked')} prompts, {fill:.0f} times L1"
    figures = {"ours": common.spread(ours.lost_percent)}
    rates = {"ours": common.spread(ours.kept)}
    value: float | None = None
    if best is not None:
        figures["upstream"], rates["upstream"] = lost[best], speeds[best]
        value = rates["ours"]["median"] / rates["upstream"]["median"]
        note += f"; upstream: {best}; " + ", ".join(
            f"{mode} loses {common.text(lost[mode], '%')}" for mode in peers if mode != best
        )
    title = "sustained store into a full L1"
    says = "our chunks refused, not found or not accounted for"
    report.add(common.Row(f"{title}: lost", "%", figures, bad, says, 0.0, note=note))
    report.add(common.Row(f"{title}: kept", "GB/s", rates, value, "ours / upstream" if value else ""))


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--seconds", type=float, default=6.0, help="of storing, for each server (default 6)")
    parser.add_argument("--upstream", metavar="PYTHON", help="of an environment with lmcache 0.5.6")
    args = parser.parse_args()
    if args.seconds < 2:
        parser.error("--seconds must be at least 2")
    report = common.Report()
    tallies, strays = measure(args.seconds, args.upstream)
    add_rows(report, tallies, strays)
    return report.end(args.json, {name: tally.turns for name, tally in tallies.items()})


if __name__ == "__main__":
    sys.exit(main())
