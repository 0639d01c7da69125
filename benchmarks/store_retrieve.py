"""Store and retrieve of a prompt of 4,096 tokens, end to end, against memcpy, the machine's limit and upstream.

    python benchmarks/store_retrieve.py [--json PATH] [--rounds 5] [--upstream PYTHON]

Ours: from token ids to the ack. Store: keys, Reserve, copy with a checksum of every byte, Commit; retrieve: keys,
Lookup, copy with a check of every byte, Release; through the threads of the vLLM connector (``CopyWorker``), by one and
by two copying threads (a store of the connector has one, a load two). Shapes: Llama 3 8B (32 layers, 128 KiB a token:
512 MiB in pieces of 32 KiB) and two small models; blocks of 16 tokens, shuffled, K and V of each layer apart.

memcpy: the same pieces between the same memory and extents of the same pool, numpy's ``take``: one C loop, a memcpy a
piece, nothing else; all is touched beforehand. Stream limit: two threads, each one memcpy of half of one big buffer
into another, which libc does with non-temporal stores.

Upstream: its own client classes (upstream_agent.py), from token ids to its ack, its lookup included where it retrieves,
in the faster of its two shared-memory modes. It copies without any checksum, and acknowledges before the chunks can be
found: "store-ack to visible" looks a prompt up right after each ack. Its L1 is emptied before each of its stores, since
it acknowledges, and does not keep, what comes faster than it evicts (sustained.py); ours is full and evicts. All of it
takes turns in one run; outside of the times, every byte that was retrieved is compared.
"""

from __future__ import annotations

import contextlib
import mmap
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import common
import numpy as np
from kv_client import Bytes, Engine, Region
from mixed_load import tokens_of
from upstream import Agent, Agents, KvShape, Upstream

from lmcache.connectors import copier

NUM_TOKENS = 4096
SHAPES = {
    "Llama 8B": KvShape(num_layers=32, token_bytes=128 << 10, num_tokens=NUM_TOKENS),
    "32 KiB a token": KvShape(num_layers=32, token_bytes=32 << 10, num_tokens=NUM_TOKENS),
    "8 KiB a token": KvShape(num_layers=16, token_bytes=8 << 10, num_tokens=NUM_TOKENS),
}
JUDGED = "Llama 8B"
BOUNDS = {"store": 1.2, "retrieve": 0.95}  # least ratio to memcpy by one thread
STREAM_BOUND = 0.9  # two threads
UPSTREAM_BOUND = 5.0
MODES = ("lmcache_driven", "shm")
OUR_PROMPTS, THEIR_PROMPTS = 2.5, 4
"""L1, in prompts: ours has half of it under lease at most, upstream evicts at four fifths."""
VISIBLE_TOKENS = 256
WARM_UP_ROUNDS = 2
Times = dict[str, list[float]]


class Plain:
    """memcpy between an engine's memory and extents of the same pool."""

    def __init__(self, engine: Engine, region: Region) -> None:
        memory = engine.memory
        self._rows = memory.rows
        self._pieces: Bytes = region.pool.reshape(-1, memory.piece_bytes)
        self._order = memory.pieces(engine.chunk_tokens).reshape(len(region.offsets), -1)
        self._firsts = region.offsets // memory.piece_bytes
        self._targets: list[Bytes] = list(memory.planes[:, memory.half + 1 :])
        self._places = memory.places(engine.chunk_tokens, region.offsets)
        self._total = memory.shape.total_bytes
        self._big: Bytes = memory.rows.reshape(-1)[: self._total]
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.truncate(self._total)
            self._flat: Bytes = np.frombuffer(mmap.mmap(file.fileno(), self._total), np.uint8)
        self._flat[:] = 1
        self._threads = ThreadPoolExecutor(2)

    def store(self, threads: int) -> float:
        """Seconds for all pieces into the pool."""

        def part(share: slice) -> None:
            for order, first in zip(self._order[share], self._firsts[share], strict=True):
                np.take(self._rows, order, axis=0, out=self._pieces[first : first + len(order)], mode="clip")

        return self._timed(part, threads, len(self._order))

    def retrieve(self, threads: int) -> float:
        """Seconds for all pieces out of the pool."""

        def part(share: slice) -> None:
            for target, places in zip(self._targets[share], self._places[share], strict=True):
                np.take(self._pieces, places, axis=0, out=target, mode="clip")

        return self._timed(part, threads, len(self._targets))

    def stream(self) -> float:
        """Seconds for as many bytes of one big buffer, half by each of two threads."""

        def part(share: slice) -> None:
            np.copyto(self._flat[share], self._big[share])

        return self._timed(part, 2, self._total)

    def _timed(self, part: Callable[[slice], None], threads: int, count: int) -> float:
        shares = [slice(index * count // threads, (index + 1) * count // threads) for index in range(threads)]
        start = time.perf_counter()
        if threads == 1:
            part(shares[0])
        else:
            list(self._threads.map(part, shares))
        return time.perf_counter() - start


def turn(engine: Engine, plain: Plain, agents: dict[str, Agent], seed: int, times: Times) -> None:
    """One round of everything, each once; what is found wrong raises RuntimeError."""
    tokens, memory = tokens_of(seed, NUM_TOKENS), engine.memory

    def add(name: str, seconds: float) -> None:
        times.setdefault(name, []).append(seconds)

    for threads in (1, 2):
        copier.STORE_THREADS = copier.LOAD_THREADS = threads
        prompt, stamp = [threads, *tokens[:-1]], 2 * seed + threads
        memory.stamp(stamp)
        add(f"memcpy store {threads}", plain.store(threads))
        add(f"ours store {threads}", engine.store(prompt))
        memory.wipe()
        add(f"memcpy retrieve {threads}", plain.retrieve(threads))
        check(memory.is_equal(stamp, NUM_TOKENS), "memcpy copied other bytes than the client does")
        memory.wipe()
        add(f"ours retrieve {threads}", engine.retrieve(prompt))
        check(memory.is_equal(stamp, NUM_TOKENS), "other bytes came back than were stored")
        add("stream", plain.stream())
    for mode, agent in agents.items():
        agent.ask("clear")
        stored = agent.ask("store", seed=seed, num_tokens=NUM_TOKENS)
        await_visible(agent, seed)
        answer = agent.ask("retrieve", seed=seed, num_tokens=NUM_TOKENS)
        check(answer["ok"] and answer["equal"], f"upstream did not return what was stored: {answer}")
        add(f"{mode} store", stored["s"])
        add(f"{mode} retrieve", answer["s"] + answer["lookup_s"])


def await_visible(agent: Agent, seed: int) -> None:
    """Wait until upstream finds what it has acknowledged, or does not in a second."""
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        found = agent.ask("lookup", seed=seed, num_tokens=NUM_TOKENS)
        if found["hit_chunks"] == found["num_chunks"]:
            return
        time.sleep(0.005)


def check(is_right: bool, what: str) -> None:
    """Raise RuntimeError where something is wrong."""
    if not is_right:
        raise RuntimeError(what)


def rates(times: Times, name: str, total_bytes: int) -> common.Spread:
    """GB/s of each round."""
    return common.spread([total_bytes / seconds / 1e9 for seconds in times[name]])


def ratio(times: Times, ours: str, other: str) -> float:
    """Median over the rounds of how many times as fast ours is."""
    return statistics.median(slow / fast for fast, slow in zip(times[ours], times[other], strict=True))


def add_rows(report: common.Report, name: str, shape: KvShape, times: Times) -> None:
    """The rows of one shape."""
    total, size = shape.total_bytes, f"{shape.total_bytes >> 20} MiB"
    is_judged = name == JUDGED
    for verb, bound in BOUNDS.items():
        for threads in (1, 2):
            ours, plain = f"ours {verb} {threads}", f"memcpy {verb} {threads}"
            figures = {"ours": rates(times, ours, total), "memcpy": rates(times, plain, total)}
            title = f"{verb}, {name}, {size}, {threads} thread{'s' * (threads > 1)}"
            if threads == 1:
                value, says, least = ratio(times, ours, plain), "ours / memcpy", bound
            else:
                limits = [min(pair) for pair in zip(times["stream"][::2], times["stream"][1::2], strict=True)]
                figures["stream limit"] = rates({"limit": limits}, "limit", total)
                value = ratio({**times, "limit": limits}, ours, "limit")
                says, least = "ours / stream limit", STREAM_BOUND
            bound_ = least if is_judged else None
            report.add(common.Row(title, "GB/s", figures, value, says, bound_, at_least=True))
        if f"{MODES[0]} {verb}" in times:
            add_upstream(report, f"{verb}, {name}, {size}, against upstream", verb, times, total)


def add_upstream(report: common.Report, title: str, verb: str, times: Times, total: int) -> None:
    """Ours with the threads that the connector has, beside upstream's faster mode."""
    ours = f"ours {verb} {1 if verb == 'store' else 2}"
    spreads = {mode: rates(times, f"{mode} {verb}", total) for mode in MODES}
    best = max(MODES, key=lambda mode: spreads[mode]["median"])
    figures = {"ours": rates(times, ours, total), "upstream": spreads[best]}
    value = figures["ours"]["median"] / figures["upstream"]["median"]
    others = [f"{mode} {common.text(spreads[mode], 'GB/s')}" for mode in MODES if mode != best]
    note = f"upstream: {best}; {', '.join(others)}"
    report.add(common.Row(title, "GB/s", figures, value, "ours / upstream", UPSTREAM_BOUND, at_least=True, note=note))


def add_visible(report: common.Report, engine: Engine, agents: dict[str, Agent], rounds: int) -> None:
    """The row of lookups right after the ack."""
    misses, ours, theirs = 0, list[float](), dict[str, list[float]]()
    for seed in range(1_000_000, 1_000_000 + rounds):
        tokens = tokens_of(seed, VISIBLE_TOKENS)
        engine.store(tokens)
        acked = missed = time.perf_counter()
        while True:
            _, num_chunks, prefix = engine.find(tokens)
            engine.let_go(prefix)
            if num_chunks * engine.chunk_tokens == VISIBLE_TOKENS:
                break
            missed, misses = time.perf_counter(), misses + 1
            if missed - acked > 5.0:
                raise RuntimeError("what was acknowledged cannot be found")
        ours.append(missed - acked)
        for mode, agent in agents.items():
            answer = agent.ask("store_visible", seed=seed, num_tokens=VISIBLE_TOKENS)
            if answer["visible_s"] is not None:
                theirs.setdefault(mode, []).append(answer["visible_s"])
    figures = {"ours": common.spread(ours, 1e3)}
    note = ""
    for mode, seconds in theirs.items():
        late = sum(second > 0 for second in seconds)
        note += f"upstream, {mode}: {late} of {len(seconds)} first lookups missed. "
        if mode == "lmcache_driven":
            figures["upstream"] = common.spread(seconds, 1e3)
    report.add(
        common.Row(
            "store-ack to visible", "ms", figures, float(misses), "our lookups that missed", 0.0, note=note.strip()
        )
    )


@contextlib.contextmanager
def upstreams(folder: Path, python: str | None, shape: KvShape, l1_gb: float) -> Iterator[dict[str, Agent]]:
    """A client in each mode, whose servers have touched all of their memory; none without ``python``."""
    with contextlib.ExitStack() as stack:
        agents: dict[str, Agent] = {}
        for mode in MODES if python else ():
            server = stack.enter_context(Upstream(folder, str(python), l1_gb, mode))
            (agents[mode],) = stack.enter_context(Agents(server, shape, threads=2))
            for seed in range(THEIR_PROMPTS):
                agents[mode].ask("store", seed=2_000_000 + seed, num_tokens=NUM_TOKENS)
            agents[mode].ask("clear")
        yield agents


def measure(report: common.Report, name: str, shape: KvShape, rounds: int, python: str | None) -> dict[str, Any]:
    """All rows of one shape; returns the times."""
    prompt_gb = shape.total_bytes / 2**30
    times: Times = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        common.Server(Path(folder), max(0.125, OUR_PROMPTS * prompt_gb)) as server,
        upstreams(Path(folder), python, shape, max(0.25, THEIR_PROMPTS * prompt_gb)) as agents,
    ):
        server.wait_allocated()
        engine, region = Engine(server.port, shape), Region(server.port, shape)
        plain = Plain(engine, region)
        for index in range(-WARM_UP_ROUNDS, rounds):
            turn(engine, plain, agents, WARM_UP_ROUNDS + index + 10, times if index >= 0 else {})
        add_rows(report, name, shape, times)
        if name == min(SHAPES, key=lambda each: SHAPES[each].token_bytes):
            add_visible(report, engine, agents, 10 * rounds)
        engine.close()
        region.close()
    return {"shape": name, "times_s": times}


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternations a shape (default 5)")
    parser.add_argument("--upstream", metavar="PYTHON", help="of an environment with lmcache 0.5.6")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    report = common.Report()
    details = [measure(report, name, shape, args.rounds, args.upstream) for name, shape in SHAPES.items()]
    return report.end(args.json, details)


if __name__ == "__main__":
    sys.exit(main())
