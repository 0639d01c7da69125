"""Lookup of a prompt, from token ids to the answer, against a bare pyzmq echo of the same frames.

    python benchmarks/lookup.py [--json PATH] [--upstream PYTHON] [--rounds 12] [--entries 1000,100000,1000000]

Ours: pack and hash the tokens, one Lookup to a real server, the reply decoded, its chunks leased: the path of the
connector's scheduler side (``SchedulerSession``), but that it waits instead of asking again at the next step.
"Hit": every chunk is held; "half": the first half; "miss": none. "New suffix": the keys of the prompt are known from
the step before but for its last tokens, as they are to the connector. "Keys known": nothing is hashed at all.

Echo: a DEALER sends a frame of the request's size to a ROUTER in another process over ipc, which answers with a frame
of the reply's size (``echo.py``). Upstream (lmcache 0.5.6): its client's `lookup` and the wait for its result, over
tcp; it sends the token ids, and its server hashes them. Ours returns where each chunk lies and its checksum, too.

All alternate in one run, in blocks of 20 (what the bounds are about: both ends awake, as under traffic) and one by one.
Servers that hold up to a million chunks are asked in turn as well; they have small extents (``clients.DenseServer``).
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import clients
import common
import echo
import upstream

from lmcache.connectors.link import Line
from lmcache.connectors.session import SchedulerSession
from lmcache.keys import KEY_BYTES, extend, namespace
from lmcache.transfer._native import pack_tokens
from lmcache.wire import codec
from lmcache.wire.messages import Found, Lookup

CHUNK_TOKENS = 256
LENGTHS_TOKENS = {"1k": 1024, "4k": 4096, "32k": 32768, "128k": 131072}
SUFFIXES_TOKENS = (256, 1024, 2048)
BLOCK = 20
BEYOND_ECHO_US = {"1k": 60.0, "4k": 60.0}
HIT_128K_US, SUFFIX_US, MISS_US, ENTRIES_RATIO = 1500.0, 400.0, 60.0, 1.2
VOCABULARY = 128_000
UPSTREAM_SHAPE = upstream.KvShape(num_layers=1, token_bytes=32, num_tokens=LENGTHS_TOKENS["128k"])
UPSTREAM_GB = 0.5
PARENT = namespace({"model": "benchmark"})


@dataclass
class Prompt:
    """Token ids and their keys; the first ``num_held`` chunks are held."""

    tokens: list[int]
    keys: list[bytes]
    num_held: int

    @classmethod
    def made(cls, num_tokens: int, seed: int, held_share: float) -> Prompt:
        """Random tokens; another seed is another prompt from its first chunk on."""
        source = random.Random(seed)
        tokens = [source.randrange(VOCABULARY) for _ in range(num_tokens)]
        keys = keys_of(tokens)
        return cls(tokens, keys, int(len(keys) * held_share))

    def frame(self) -> bytes:
        """What the echo is asked: as long as the request, with a reply as long as the answer."""
        request = Lookup(1 << 20, keys=bytes(len(self.keys) * KEY_BYTES), promote=True)
        some = bytes(self.num_held * 8)
        reply = Found(1 << 20, self.num_held, 1 << 62, 30.0, some, some)
        return echo.frame_of(len(codec.encode(request)), len(codec.encode(reply)))


def keys_of(tokens: list[int], parent: bytes = PARENT) -> list[bytes]:
    """Keys of the chunks of a prompt, or of what follows the chunk that is ``parent``."""
    return extend(parent, pack_tokens(tokens), CHUNK_TOKENS)


def continued(known: list[bytes], suffix: list[int]) -> list[bytes]:
    """Known keys, and those of the tokens behind them."""
    return known + keys_of(suffix, known[-1])


class Bench:
    """One server, the bare echo, upstream's server, and who asks them."""

    def __init__(
        self, stack: contextlib.ExitStack, folder: Path, report: common.Report, rounds: int, python: str | None
    ) -> None:
        """``python``: of an environment with upstream's release."""
        self.report = report
        self.rounds = rounds
        server = stack.enter_context(common.Server(folder, 0.25))
        server.wait_allocated()
        self.line, self.session = asker(stack, server)
        self.bare = stack.enter_context(echo.ZmqEcho(folder))
        self.agent: upstream.Agent | None = None
        if python:
            theirs = stack.enter_context(upstream.Upstream(folder, python, UPSTREAM_GB, "lmcache_driven"))
            (self.agent,) = stack.enter_context(upstream.Agents(theirs, UPSTREAM_SHAPE))

    def turns(
        self, ours: Callable[[], float], frame: bytes, block: int = BLOCK, theirs: Callable[[], float] | None = None
    ) -> dict[str, common.Spread]:
        """All in turn; microseconds."""
        ends = {"ours": ours, "bare echo": lambda: self.bare.seconds(frame)}
        if theirs is not None:
            ends["upstream"] = theirs
        taken = echo.alternate(ends, self.rounds * BLOCK // block, block)
        return {name: common.spread(seconds, 1e6) for name, seconds in taken.items()}

    def row(self, name: str, figures: dict[str, common.Spread], bound_us: float | None, *, beyond: bool = True) -> None:
        """Judge ours, or what it takes beyond the echo."""
        value = figures["ours"]["median"] - (figures["bare echo"]["median"] if beyond else 0.0)
        self.report.add(common.Row(name, "us", figures, value, "ours - bare echo" if beyond else "ours", bound_us))

    def ask(self, prompt: Prompt, make_keys: Callable[[], list[bytes]]) -> Callable[[], float]:
        """Seconds of a lookup of this prompt."""
        return lambda: clients.answered(self.session, make_keys, prompt.num_held)

    def theirs(self, seed: int, num_tokens: int, num_held: int) -> Callable[[], float] | None:
        """Seconds of upstream's lookup of as long a prompt, of which it holds as many chunks.

        Raises:
            RuntimeError: it does not.
        """
        agent = self.agent
        if agent is None:
            return None
        held_tokens = num_held * agent.chunk_tokens
        if held_tokens:
            agent.ask("store_visible", seed=seed, num_tokens=held_tokens)

        def look_up() -> float:
            answer = agent.ask("lookup", seed=seed, num_tokens=num_tokens, held_tokens=held_tokens)
            if answer["hit_chunks"] != num_held:
                raise RuntimeError(f"upstream holds {answer['hit_chunks']} chunks, not {num_held}")
            return float(answer["s"])

        return look_up

    def prompts(self) -> None:
        """Each length, held wholly, half and not at all."""
        for seed, (length, num_tokens) in enumerate(LENGTHS_TOKENS.items()):
            for kind, share in (("hit", 1.0), ("half", 0.5), ("miss", 0.0)):
                prompt = Prompt.made(num_tokens, 10 * seed + int(share * 4), share)
                clients.hold(self.line, prompt.keys[: prompt.num_held])
                ours = self.ask(prompt, functools.partial(keys_of, prompt.tokens))
                theirs = self.theirs(10 * seed + int(share * 4), num_tokens, prompt.num_held)
                figures = self.turns(ours, prompt.frame(), BLOCK, theirs)
                if kind == "hit" and length == "128k":
                    self.row(f"lookup, {length}, {kind}", figures, HIT_128K_US, beyond=False)
                else:
                    self.row(f"lookup, {length}, {kind}", figures, BEYOND_ECHO_US.get(length))
                if kind == "hit":
                    self.row(f"lookup, {length}, {kind}, one by one", self.turns(ours, prompt.frame(), 1), None)

    def suffixes(self) -> None:
        """128k tokens, all held, of which only the last few are new to who asks."""
        prompt = Prompt.made(LENGTHS_TOKENS["128k"], 100, 1.0)
        clients.hold(self.line, prompt.keys)
        for num_tokens in SUFFIXES_TOKENS:
            known = prompt.keys[: -num_tokens // CHUNK_TOKENS]
            suffix = prompt.tokens[-num_tokens:]
            ours = self.ask(prompt, functools.partial(continued, known, suffix))
            name = f"lookup, 128k, hit, new suffix of {num_tokens}"
            self.row(name, self.turns(ours, prompt.frame()), SUFFIX_US, beyond=False)

    def misses(self) -> None:
        """A miss must cost an echo, however long the prompt is: the server stops at the first chunk that it lacks."""
        for length, num_tokens in LENGTHS_TOKENS.items():
            prompt = Prompt.made(num_tokens, 200 + num_tokens, 0.0)
            ours = self.ask(prompt, prompt.keys.copy)
            self.row(f"lookup, {length}, miss, keys known", self.turns(ours, prompt.frame()), MISS_US)


def asker(stack: contextlib.ExitStack, server: common.Server) -> tuple[Line, SchedulerSession]:
    """A worker's line, which stores, and the session that asks."""
    worker, line = clients.attached(server.port, "worker")
    stack.callback(line.client.close)
    stack.callback(worker.close)
    link, _ = clients.attached(server.port, "scheduler")
    session = SchedulerSession(link)
    stack.callback(session.close)
    return line, session


def many_entries(report: common.Report, rounds: int, entries: Sequence[int]) -> None:
    """The same 4k prompt asked of servers that hold few and many other chunks; the last against the first is judged."""
    prompt = Prompt.made(LENGTHS_TOKENS["4k"], 300, 1.0)
    with contextlib.ExitStack() as stack:
        ends = {}
        for number in entries:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            server = stack.enter_context(clients.DenseServer(folder, number))
            server.wait_allocated()
            line, session = asker(stack, server)
            source = random.Random(number)
            others = [source.randbytes(KEY_BYTES) for _ in range(number - len(prompt.keys))]
            half = len(others) // 2
            for keys in (others[:half], prompt.keys, others[half:]):
                clients.hold(line, keys)
            held = server.status()["storage_manager"]["l1_manager"]["total_object_count"]
            if held != number:
                raise RuntimeError(f"the server holds {held} chunks, not {number}")
            ends[f"{number:,} held"] = asked(session, prompt)
        taken = echo.alternate(ends, rounds, BLOCK)
        figures = {name: common.spread(seconds, 1e6) for name, seconds in taken.items()}
        first, *_, last = figures.values()
        ratio = last["median"] / first["median"]
        report.add(common.Row("lookup, 4k, hit, by entries", "us", figures, ratio, "last / first", ENTRIES_RATIO))


def asked(session: SchedulerSession, prompt: Prompt) -> Callable[[], float]:
    """Seconds of a lookup of this prompt, from its tokens."""
    return lambda: clients.answered(session, lambda: keys_of(prompt.tokens), prompt.num_held)


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--upstream", metavar="PYTHON", help="python of an environment with lmcache 0.5.6")
    parser.add_argument("--rounds", type=int, default=12, help=f"blocks of {BLOCK} of each kind")
    parser.add_argument("--entries", default="1000,100000,1000000", help="numbers of held chunks, 1000 or more")
    args = parser.parse_args()
    entries = [int(number) for number in args.entries.split(",")]
    if args.rounds < 2 or min(entries) < 1000 or len(entries) < 2:
        parser.error("--rounds is 2 or more, --entries 1000 or more each, two or more of them")
    report = common.Report()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(stack, folder, report, args.rounds, args.upstream)
        bench.prompts()
        bench.suffixes()
        bench.misses()
    many_entries(report, args.rounds, entries)
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
