"""Lookup of a held prompt, from token ids to the answer, against a bare pyzmq echo of the same frames.

    python benchmarks/lookup.py [--json PATH] [--rounds 600]

Ours: pack and hash the tokens, one Lookup over ipc to a real server that holds every chunk, the reply decoded: the path
of the connector's scheduler side (``SchedulerSession``), but that it waits instead of asking again at the next step.
Echo: a DEALER sends a frame of the request's size to a ROUTER in another process over ipc, which answers with a frame
of the reply's size. The two alternate in one run, in blocks of 20 (what the bound is about: both ends awake, as under
traffic) and one by one (each finds the other end asleep and the caches cold, as on an idle machine).
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import common
import zmq

from lmcache.connectors.link import Address, Line, Link
from lmcache.connectors.session import SchedulerSession
from lmcache.keys import KEY_BYTES, extend, namespace
from lmcache.transfer._native import pack_tokens
from lmcache.wire import codec
from lmcache.wire.messages import GRANTED, KEYS_MAX, Commit, Found, Granted, Lookup, Register, Reserve

PROMPTS_TOKENS = (1024, 4096, 32768, 131072)
BOUND_TOKENS, BOUND_US = 4096, 60.0
CHUNK_TOKENS = 256
EXTENT_BYTES = 4096
BLOCKS = (20, 1)
WARM_UP_BLOCKS = 1
ANSWER_S = 5.0


def echo_server(endpoint: str) -> None:
    """Answer each frame with its first n bytes; n is its first 4 bytes, little-endian. Ends with its standard input."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.bind(endpoint)
    poller = zmq.Poller()
    poller.register(router, zmq.POLLIN)
    poller.register(sys.stdin.fileno(), zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if sys.stdin.fileno() in ready:
            router.close(0)
            return
        identity, frame = router.recv_multipart()
        router.send_multipart((identity, frame[: int.from_bytes(frame[:4], "little")]))


class Echo:
    """The asking end of the echo, and its process."""

    def __init__(self, folder: Path) -> None:
        endpoint = f"ipc://{folder}/echo"
        self._process = subprocess.Popen([sys.executable, __file__, "--echo-server", endpoint], stdin=subprocess.PIPE)
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.connect(endpoint)

    def seconds(self, request_bytes: int, reply_bytes: int) -> float:
        """One round trip."""
        frame = reply_bytes.to_bytes(4, "little") + bytes(max(request_bytes, reply_bytes) - 4)
        start = time.perf_counter()
        self._dealer.send(frame)
        self._dealer.recv()
        return time.perf_counter() - start

    def close(self) -> None:
        """End both."""
        self._dealer.close(0)
        self._context.term()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


def attached(port: int, role: str) -> tuple[Link, Line]:
    """A registered process of an engine that copies nothing: its role is all that is real."""
    is_worker = role == "worker"

    def registration(_: int) -> Register:
        extent_bytes = EXTENT_BYTES if is_worker else 0
        return Register(0, role=role, model="m", engine="benchmark", rank=0, world_size=1, extent_bytes=extent_bytes)

    link = Link(Address("tcp://127.0.0.1", port), f"benchmark {role}", is_worker, registration)
    link.wait_first_try(ANSWER_S)
    if link.line is None:
        raise RuntimeError("cannot attach to the server")
    return link, link.line


def hold(line: Line, keys: list[bytes]) -> None:
    """Make the server hold an extent for every key; the checksums are made up, nobody will read the bytes."""
    for start in range(0, len(keys), 64):
        granted = line.client.call(Reserve(0, keys=b"".join(keys[start : start + 64])), ANSWER_S)
        if not isinstance(granted, Granted):
            raise RuntimeError(f"no extents: {granted}")
        checksums = array("Q", range(granted.states.count(GRANTED)))
        line.client.call(Commit(0, ticket=granted.ticket, checksums=checksums.tobytes()), ANSWER_S)


def look_up(session: SchedulerSession, parent: bytes, tokens: list[int]) -> tuple[float, float]:
    """Seconds from token ids to the answer, and those of them spent on the keys; ends the lease afterwards, untimed."""
    start = time.perf_counter()
    keys = extend(parent, pack_tokens(tokens), CHUNK_TOKENS)
    keyed = time.perf_counter()
    question = session.ask(keys)
    if question is None:
        raise RuntimeError("the server is gone")
    question.line.client.poll(ANSWER_S)
    while not session.poll(question):
        question.line.client.poll(ANSWER_S)
    end = time.perf_counter()
    if question.answer is None or question.answer.num_chunks != len(keys):
        raise RuntimeError("the server does not hold what was stored")
    session.release(question.answer)
    question.line.client.poll(ANSWER_S)
    session.pump()
    return end - start, keyed - start


def measure(
    session: SchedulerSession, echo: Echo, parent: bytes, tokens: list[int], rounds: int, block: int
) -> dict[str, Any]:
    """Both in turn, ``rounds`` times each, ``block`` of one after ``block`` of the other."""
    num_chunks = len(tokens) // CHUNK_TOKENS
    some = bytes(num_chunks * 8)
    request_bytes = len(codec.encode(Lookup(1 << 20, keys=bytes(num_chunks * KEY_BYTES))))
    reply_bytes = len(codec.encode(Found(1 << 20, num_chunks, 1 << 20, 30.0, some, some)))
    ours: list[tuple[float, float]] = []
    bare: list[float] = []
    for index in range(-WARM_UP_BLOCKS, -(-rounds // block)):
        pairs = [look_up(session, parent, tokens) for _ in range(block)]
        echoes = [echo.seconds(request_bytes, reply_bytes) for _ in range(block)]
        if index >= 0:
            ours += pairs
            bare += echoes
    lookup_us, echo_us = common.spread([pair[0] for pair in ours], 1e6), common.spread(bare, 1e6)
    return {
        "tokens": len(tokens),
        "block": block,
        "request_bytes": request_bytes,
        "reply_bytes": reply_bytes,
        "lookup_us": lookup_us,
        "keys_us": common.spread([pair[1] for pair in ours], 1e6),
        "echo_us": echo_us,
        "beyond_echo_us": lookup_us["median"] - echo_us["median"],
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['tokens']:>8}  {row['block']:>5}  {row['request_bytes']:>6} / {row['reply_bytes']:<5}"
        f"  {common.text(row['lookup_us'], 'us'):>26}  {common.text(row['keys_us'], 'us'):>24}"
        f"  {common.text(row['echo_us'], 'us'):>22}  {row['beyond_echo_us']:>9.1f} us",
        flush=True,
    )


def run(rounds: int) -> list[dict[str, Any]]:
    """Every prompt length; prints a line for each."""
    rows = []
    parent, source = namespace({"model": "benchmark"}), random.Random(0)
    print(
        f"{'tokens':>8}  {'frames, bytes':>14}  {'lookup':>26}  {'of it keys':>24}  {'echo':>22}  {'beyond echo':>12}"
    )
    with tempfile.TemporaryDirectory() as name, common.Server(Path(name), 0.25) as server:
        server.wait_allocated()
        echo = Echo(Path(name))
        worker, line = attached(server.port, "worker")
        asker, _ = attached(server.port, "scheduler")
        session = SchedulerSession(asker)
        for num_tokens in PROMPTS_TOKENS:
            tokens = [source.randrange(128_000) for _ in range(num_tokens)]
            keys = extend(parent, pack_tokens(tokens), CHUNK_TOKENS)
            assert len(keys) <= KEYS_MAX
            hold(line, keys)
            for block in BLOCKS:
                row = measure(
                    session, echo, parent, tokens, rounds if num_tokens <= BOUND_TOKENS else rounds // 4, block
                )
                rows.append(row)
                show(row)
        session.close()
        worker.close()
        line.client.close()
        echo.close()
    return rows


def main() -> int:
    """Exit 1 when the bound is missed."""
    if sys.argv[1:2] == ["--echo-server"]:
        echo_server(sys.argv[2])
        return os.EX_OK
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=600, help="alternations a length (a quarter beyond 4k tokens)")
    args = parser.parse_args()
    if args.rounds < 8:
        parser.error("--rounds must be at least 8")
    facts = common.head()
    rows = run(args.rounds)
    common.write(args.json, {**facts, "rows": rows})
    (row,) = (row for row in rows if row["tokens"] == BOUND_TOKENS and row["block"] == max(BLOCKS))
    name = f"lookup of {BOUND_TOKENS} tokens beyond the echo"
    return 0 if common.judge(name, row["beyond_echo_us"], BOUND_US, "us") else 1


if __name__ == "__main__":
    sys.exit(main())
