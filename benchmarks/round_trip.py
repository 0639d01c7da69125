"""The smallest question there is, from the client's call to the answer in its hands, against bare echoes.

    python benchmarks/round_trip.py [--json PATH] [--upstream PYTHON] [--rounds 60]

Ours: ``Client.call(Ping)`` to a real server, as an engine's, over a unix stream socket: encoded, sent, decoded and
dispatched there, answered, decoded here, each with its checks. Bare echo: the same frame sizes from a pyzmq DEALER to a
ROUTER over ipc and back, neither end doing anything else. Raw socket: the same over a unix stream socket. Upstream
(lmcache 0.5.6): its client's `noop`, over tcp, since it has nothing else; it has no frame for an error, and checks
nothing.

They take turns in one run, in blocks of 50 (what the bound is about: both ends awake, as under traffic) and one by one
(each finds the other end asleep and the caches cold, as on an idle machine).
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import clients
import common
import echo
import upstream

from lmcache.wire import codec
from lmcache.wire.messages import Ping, Pong

BOUND = 1.15
BLOCKS = {"blocks of 50": 50, "one by one": 1}
CALL_S = 5.0
UPSTREAM_SHAPE = upstream.KvShape(num_layers=1, token_bytes=32, num_tokens=1024)


def measure(ends: dict[str, Callable[[], float]], report: common.Report, rounds: int) -> None:
    """A row for each way to take turns."""
    for name, block in BLOCKS.items():
        taken = echo.alternate(ends, rounds * (1 if block > 1 else 10), block)
        figures = {end: common.spread(seconds, 1e6) for end, seconds in taken.items()}
        ratio = figures["ours"]["median"] / figures["bare echo"]["median"]
        bound = BOUND if block > 1 else None
        report.add(common.Row(f"round trip, {name}", "us", figures, ratio, "ours / bare echo", bound))


def main() -> int:
    """Exit 1 when the bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--upstream", metavar="PYTHON", help="python of an environment with lmcache 0.5.6")
    parser.add_argument("--rounds", type=int, default=60, help="turns of each end (ten times as many one by one)")
    args = parser.parse_args()
    report = common.Report()
    request, reply = codec.encode(Ping(1 << 20)), codec.encode(Pong(1 << 20, 1 << 30))
    frame = echo.frame_of(len(request), len(reply))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = stack.enter_context(common.Server(folder, 0.1))
        server.wait_allocated()
        bare, raw = stack.enter_context(echo.ZmqEcho(folder)), stack.enter_context(echo.SocketEcho(folder))
        link, line = clients.attached(server.port, "scheduler")
        stack.callback(line.client.close)
        stack.callback(link.close)

        def ask() -> float:
            start = time.perf_counter()
            line.client.call(Ping(0), CALL_S)
            return time.perf_counter() - start

        ends = {"ours": ask, "bare echo": lambda: bare.seconds(frame), "raw socket": lambda: raw.seconds(frame)}
        if args.upstream:
            theirs = stack.enter_context(upstream.Upstream(folder, args.upstream, 0.1, "lmcache_driven"))
            (agent,) = stack.enter_context(upstream.Agents(theirs, UPSTREAM_SHAPE))
            ends["upstream"] = lambda: float(agent.ask("noop")["s"])
        measure(ends, report, args.rounds)
    return report.end(args.json, {"request_bytes": len(request), "reply_bytes": len(reply)})


if __name__ == "__main__":
    sys.exit(main())
