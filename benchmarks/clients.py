"""Clients of a server under measurement that copy nothing, and a server that can hold very many chunks."""

from __future__ import annotations

import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import common

from lmcache.connectors.link import Address, Line, Link
from lmcache.connectors.session import SchedulerSession
from lmcache.wire.messages import GRANTED, Commit, Granted, Register, Reserve

EXTENT_BYTES = 4096
ANSWER_S = 30.0
_BATCH = 1024


def attached(port: int, role: str) -> tuple[Link, Line]:
    """A registered process of an engine that copies nothing: its role ("worker", "scheduler") is all that is real."""
    is_worker = role == "worker"

    def registration(_: int) -> Register:
        extent_bytes = EXTENT_BYTES if is_worker else 0
        return Register(0, role=role, model="m", engine="benchmark", rank=0, world_size=1, extent_bytes=extent_bytes)

    link = Link(Address("tcp://127.0.0.1", port), f"benchmark {role}", is_worker, registration)
    link.wait_first_try(ANSWER_S)
    if link.line is None:
        raise RuntimeError("cannot attach to the server")
    return link, link.line


def hold(line: Line, keys: Sequence[bytes]) -> None:
    """Make the server hold an extent for every key; the checksums are made up, nobody will read the bytes."""
    for start in range(0, len(keys), _BATCH):
        granted = line.client.call(Reserve(0, keys=b"".join(keys[start : start + _BATCH])), ANSWER_S)
        if not isinstance(granted, Granted):
            raise RuntimeError(f"no extents: {granted}")
        checksums = array("Q", range(granted.states.count(GRANTED)))
        line.client.call(Commit(0, ticket=granted.ticket, checksums=checksums.tobytes()), ANSWER_S)


def answered(session: SchedulerSession, make_keys: Callable[[], Sequence[bytes]], num_held: int) -> float:
    """Seconds from before ``make_keys`` to the answer of the lookup of these keys; ends the lease afterwards, untimed.

    As the connector's scheduler side does it, but that it waits instead of asking again at the next step.

    Raises:
        RuntimeError: not ``num_held`` leading chunks are held, or the server is gone.
    """
    start = time.perf_counter()
    question = session.ask(make_keys())
    if question is None:
        raise RuntimeError("the server is gone")
    client = question.line.client
    client.poll(ANSWER_S)
    while not session.poll(question):
        client.poll(ANSWER_S)
    seconds = time.perf_counter() - start
    found = question.answer.num_chunks if question.answer is not None else 0
    if found != num_held:
        raise RuntimeError(f"the server holds {found} chunks, not {num_held}")
    if question.answer is not None:
        session.release(question.answer)
        client.poll(ANSWER_S)
        session.pump()
    return seconds


class DenseServer(common.Server):
    """A real server, but for one constant: its records file has a place for each 4 KiB of L1, not for each 64 KiB.

    So a million entries need 4 GiB of L1 instead of 64. L1 has room for ``entries`` chunks of ``EXTENT_BYTES``.
    """

    def __init__(self, folder: Path, entries: int) -> None:
        self.port, http_port = common.free_port(), common.free_port()
        self.url = f"http://127.0.0.1:{http_port}"
        log_path = folder / f"server-{self.port}.log"
        l1_gb = max(1 / 16, entries * EXTENT_BYTES * 1.02 / 2**30)
        command = [sys.executable, __file__, "--port", str(self.port), "--http-port", str(http_port)]
        start = time.monotonic()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen([*command, "--l1-size-gb", f"{l1_gb:.3f}"], stdout=log, stderr=log)
        self.ready_s = common.wait_for(f"{self.url}/healthcheck", self.process, log_path) - start


def _serve() -> None:
    from lmcache.cache import records
    from lmcache.server.command import server

    records.SLOT_POOL_BYTES = EXTENT_BYTES
    server(prog_name="lmcache server")


if __name__ == "__main__":
    _serve()
