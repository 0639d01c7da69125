"""1, 4 and 16 clients at once: operations per second, and how long each takes, beside upstream; a lookup under load.

    python benchmarks/many_clients.py [--json PATH] [--rounds 1] [--seconds 1] [--upstream PYTHON]

Each client is a process that sends request after request, as an engine does (mixed_load.py): every second prompt is new
(a lookup that misses, then a store), every other was stored before (a lookup that hits, then a retrieve). Prompts have
1,024 tokens in 4 chunks: of 64 KiB, where the conversation is nearly all of the work, or of 1 MiB. Ours makes a
checksum of every byte it stores and checks every byte it retrieves, upstream does neither. Ours, and upstream in each
of its two shared-memory modes, take turns; "upstream" is the faster mode. All processes share this machine's cores.

The last rows: one client looks a held prompt of 4,096 tokens up every 2 ms, while nothing else happens and while
another client stores 1 MiB chunks without a pause and /status is read every 100 ms, in turn. What the machine itself
does to an exchange of two processes beside that load tells the raw socket: frames of a lookup's sizes, sent to a
process that only sends them back, at the same times beside the same stores and scrapes of ours.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol, Self

import common
import echo
import mixed_load
from upstream import Agents, KvShape, Upstream

LEVELS = (1, 4, 16)
NUM_TOKENS = 1024
SHAPES = {
    "64 KiB": (KvShape(num_layers=4, token_bytes=256, num_tokens=NUM_TOKENS), LEVELS),
    "1 MiB": (KvShape(num_layers=8, token_bytes=4096, num_tokens=NUM_TOKENS), LEVELS[-1:]),
}
"""By the size of a chunk: KV, and the numbers of clients."""
L1_GB = 2.0
LOOKUP_TOKENS = 4096
LOOKUP_SHAPE = KvShape(num_layers=8, token_bytes=4096, num_tokens=LOOKUP_TOKENS)
LOOKUP_PAUSE_S, SCRAPE_S = 0.002, 0.1
LOOKUP_FRAMES_BYTES = (530, 300)  # of a request that names 16 chunks, and of its answer
RAW = "raw socket"
MODES = ("lmcache_driven", "shm")
BOUND, LOADED_BOUND = 3.0, 2.0
KINDS = ("lookup", "store", "retrieve")
START_S, LOOKUP_START_S = 0.05, 0.3
"""Between the order and the moment at which all clients begin."""
HELD_SEED = 7
ANSWER_S = 120.0


class Obeys(Protocol):
    """One client in a process of its own, ours or upstream's."""

    def begin(self, what: str, **details: object) -> None:
        """Give an order."""

    def finish(self) -> dict[str, Any]:
        """Its answer."""


def _serve(line: Connection, port: int, shape: KvShape) -> None:
    from kv_client import Direct

    client = Direct(port, shape)
    line.send({"chunk_tokens": client.chunk_tokens})
    while (order := line.recv()) is not None:
        kind, plan = order
        line.send(getattr(mixed_load, kind)(client, **plan))
    client.close()


class Ours:
    """One client of our server, like ``upstream.Agent``. Its process is forked: this one must have no threads yet."""

    def __init__(self, port: int, shape: KvShape) -> None:
        forked = multiprocessing.get_context("fork")
        self._line, other = forked.Pipe()
        self.process = forked.Process(target=_serve, args=(other, port, shape), daemon=True)
        self.process.start()
        other.close()

    def begin(self, what: str, **details: object) -> None:
        """Give an order: "load_of", a load of mixed_load.py."""
        assert what == "load_of"
        self._line.send((details.pop("kind"), details))

    def finish(self) -> dict[str, Any]:
        """Its answer; that of a new client comes once it is attached.

        Raises:
            RuntimeError: the client did not answer in time, or ended.
        """
        if not self._line.poll(ANSWER_S):
            raise RuntimeError("one of our clients does not answer")
        answer: dict[str, Any] = self._line.recv()
        return answer

    def close(self) -> None:
        """End it; not by the end of the pipe, which its brothers have open, too."""
        with contextlib.suppress(OSError):
            self._line.send(None)
        self.process.join(10)
        self._line.close()


class OurClients:
    """``number`` of ours; a list while entered."""

    def __init__(self, server: common.Server, shape: KvShape, number: int) -> None:
        self._all = [Ours(server.port, shape) for _ in range(number)]

    def __enter__(self) -> list[Ours]:
        for client in self._all:
            client.finish()
        return self._all

    def __exit__(self, *_: object) -> None:
        for client in self._all:
            client.close()


def together(clients: Sequence[Obeys], kind: str, first_seed: int, **plan: object) -> list[dict[str, Any]]:
    """Let all carry out one load at the same time; each has seeds of its own."""
    start_at = time.monotonic() + START_S
    for index, client in enumerate(clients):
        seed = first_seed + 100_000 * index
        client.begin("load_of", kind=kind, start_at=start_at, first_seed=seed, **plan)
    return [client.finish() for client in clients]


Turn = dict[str, Any]
"""``ops_s``, and the times of each kind in seconds, of all clients together."""


def mixed(clients: Sequence[Obeys], seconds: float, first_seed: int) -> Turn:
    """One turn of the mixed load.

    Raises:
        RuntimeError: a retrieve of what a lookup had found failed.
    """
    answers = together(clients, "run", first_seed, seconds=seconds, num_tokens=NUM_TOKENS, chunk_tokens=256)
    if any(answer["failed"] for answer in answers):
        raise RuntimeError("a retrieve failed")
    times = {kind: [second for answer in answers for second in answer["times"][kind]] for kind in KINDS}
    longest_s = max(answer["elapsed_s"] for answer in answers)
    refused = sum(answer["refused"] for answer in answers)
    return {"ops_s": sum(map(len, times.values())) / longest_s, "refused": refused, **times}


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all are below."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def add_mixed(report: common.Report, size: str, number: int, turns: dict[str, list[Turn]]) -> None:
    """Rows of one number of clients: operations per second, and for the most clients each kind."""
    rates = {name: common.spread([turn["ops_s"] for turn in of]) for name, of in turns.items()}
    title = f"{number} client{'s' * (number > 1)}, chunks of {size}"
    best = max((mode for mode in MODES if mode in turns), key=lambda mode: rates[mode]["median"], default=None)
    figures, value, note = {"ours": rates["ours"]}, None, ""
    if best is not None:
        figures["upstream"] = rates[best]
        value = rates["ours"]["median"] / rates[best]["median"]
        others = [f"{mode} {common.text(rates[mode], 'ops/s')}" for mode in MODES if mode != best]
        note = f"upstream: {best}; {', '.join(others)}"
    bound = BOUND if number == max(LEVELS) else None
    report.add(common.Row(title, "ops/s", figures, value, "ours / upstream", bound, at_least=True, note=note))
    if number != max(LEVELS):
        return
    for kind in KINDS:
        pooled = {name: [second for turn in of for second in turn[kind]] for name, of in turns.items()}
        shown = {"ours": common.spread(pooled["ours"], 1e3)}
        late = {"ours": percentile(pooled["ours"], 0.99) * 1e3}
        if best is not None and pooled[best]:
            shown["upstream"], late["upstream"] = common.spread(pooled[best], 1e3), percentile(pooled[best], 0.99) * 1e3
        note = "p99: " + ", ".join(f"{name} {common.short(late[name])} ms" for name in late)
        value = late["ours"] / late["upstream"] if "upstream" in late else None
        report.add(common.Row(f"{kind}, {title}", "ms", shown, value, "p99, ours / upstream", note=note))


Servers = dict[str, common.Server | Upstream]
"""By name: "ours", and upstream's modes."""


@contextlib.contextmanager
def servers(python: str | None) -> Iterator[Servers]:
    """Ours, and upstream's if there is a ``python``; all of our L1 exists."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(common.Server(folder, L1_GB))
        made: Servers = {"ours": ours}
        for mode in MODES if python else ():
            made[mode] = stack.enter_context(Upstream(folder, str(python), L1_GB, mode))
        ours.wait_allocated()
        yield made


@contextlib.contextmanager
def crowd(made: Servers, shape: KvShape, number: int) -> Iterator[dict[str, Sequence[Obeys]]]:
    """``number`` clients of each server."""
    with contextlib.ExitStack() as stack:
        clients: dict[str, Sequence[Obeys]] = {}
        for name, server in made.items():
            one = Agents(server, shape, number) if isinstance(server, Upstream) else OurClients(server, shape, number)
            clients[name] = stack.enter_context(one)
        yield clients


def measure_mixed(report: common.Report, made: Servers, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """All rows of the mixed load; returns the details."""
    details, first_seed = [], 0
    for size, (shape, levels) in SHAPES.items():
        with crowd(made, shape, max(levels)) as clients:
            for of in clients.values():  # warm up
                mixed(of, 0.2, first_seed)
            for number in levels:
                turns: dict[str, list[Turn]] = {name: [] for name in clients}
                for _ in range(rounds):
                    first_seed += 10_000_000
                    for name, of in clients.items():
                        turns[name].append(mixed(of[:number], seconds, first_seed))
                add_mixed(report, size, number, turns)
                rates = {name: [turn["ops_s"] for turn in of] for name, of in turns.items()}
                refused = {name: sum(turn["refused"] for turn in of) for name, of in turns.items()}
                details.append({"chunk": size, "clients": number, "ops_s": rates, "refused": refused})
    return details


class Scraper:
    """Reads /status every ``SCRAPE_S`` while entered."""

    def __init__(self, url: str) -> None:
        self._url = f"{url}/status"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._ended.wait(SCRAPE_S):
            with urllib.request.urlopen(self._url, timeout=10) as reply:
                reply.read()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


class RawLooker:
    """Asks a raw socket's echo, like a client that looks a prompt up."""

    def __init__(self, raw: echo.SocketEcho) -> None:
        self._raw = raw
        self._plan: dict[str, Any] = {}

    def begin(self, what: str, **details: object) -> None:
        """Note the plan of a "look_on"."""
        assert (what, details["kind"]) == ("load_of", "look_on")
        self._plan = details

    def finish(self) -> dict[str, Any]:
        """Carry it out, in this process."""
        times, start_at = list[float](), self._plan["start_at"]
        frame = echo.frame_of(*LOOKUP_FRAMES_BYTES)
        time.sleep(max(0.0, start_at - time.monotonic()))
        while time.monotonic() < start_at + self._plan["seconds"]:
            times.append(self._raw.seconds(frame))
            time.sleep(self._plan["pause_s"])
        return {"times": times}


def look(clients: Sequence[Obeys], url: str, seconds: float, loaded: bool, seed: int) -> list[float]:
    """Times of the first client's lookups; the second one stores meanwhile if ``loaded``."""
    looker, storer = clients
    start_at = time.monotonic() + LOOKUP_START_S
    with contextlib.ExitStack() as stack:
        if loaded:
            stack.enter_context(Scraper(url))
            plan: dict[str, Any] = {"first_seed": seed, "num_tokens": NUM_TOKENS, "looks_behind": None}
            storer.begin("load_of", kind="store_on", start_at=start_at, seconds=seconds, **plan)
        plan = {"num_tokens": LOOKUP_TOKENS, "seed": HELD_SEED, "pause_s": LOOKUP_PAUSE_S}
        looker.begin("load_of", kind="look_on", start_at=start_at, seconds=seconds, **plan)
        times: list[float] = looker.finish()["times"]
        if loaded:
            storer.finish()
    return times


def measure_lookup(report: common.Report, made: Servers, rounds: int, seconds: float) -> dict[str, Any]:
    """The rows of a lookup under load; returns the details."""
    late: dict[str, list[float]] = {}
    seed = 500_000_000
    with contextlib.ExitStack() as stack:
        clients = {**stack.enter_context(crowd(made, LOOKUP_SHAPE, 2))}
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        clients[RAW] = [RawLooker(stack.enter_context(echo.SocketEcho(folder))), clients["ours"][1]]
        for index in range(-1, 2 * rounds):
            for name, of in clients.items():
                for loaded in (False, True):
                    seed += 100_000
                    server = made["ours" if name == RAW else name]
                    times = look(of, server.url, seconds if index >= 0 else 0.2, loaded, seed)
                    if index >= 0:
                        late.setdefault(f"{name}, {'loaded' if loaded else 'idle'}", []).append(percentile(times, 0.99))
    for name in made:
        figures = {
            f"{'ours' if name == 'ours' else 'upstream'}{end}": common.spread(late[f"{name}, {state}"], 1e3)
            for state, end in (("loaded", ""), ("idle", ", idle"))
        }
        ratio = statistics.median(late[f"{name}, loaded"]) / statistics.median(late[f"{name}, idle"])
        title = "p99 of a lookup beside stores and scrapes"
        if name == "ours":
            raw = {state: common.spread(late[f"{RAW}, {state}"], 1e3) for state in ("loaded", "idle")}
            figures |= {RAW: raw["loaded"], f"{RAW}, idle": raw["idle"]}
            note = f"{RAW}: loaded / idle = {raw['loaded']['median'] / raw['idle']['median']:.2f}"
            report.add(common.Row(title, "ms", figures, ratio, "loaded / idle", LOADED_BOUND, note=note))
        else:
            report.add(common.Row(f"{title}: upstream, {name}", "ms", figures, ratio, "loaded / idle"))
    return late


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="turns of each server at each number (default 1)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn (default 1)")
    parser.add_argument("--upstream", metavar="PYTHON", help="of an environment with lmcache 0.5.6")
    args = parser.parse_args()
    if args.rounds < 1 or args.seconds < 0.5:
        parser.error("--rounds must be at least 1, --seconds at least 0.5")
    report = common.Report()
    with servers(args.upstream) as made:
        details = {
            "lookup_p99_s": measure_lookup(report, made, args.rounds, args.seconds),
            "mixed": measure_mixed(report, made, args.rounds, args.seconds),
        }
    return report.end(args.json, details)


if __name__ == "__main__":
    sys.exit(main())
