"""A real core and its clients in one thread, and how many bytecode instructions of ours each of them executes.

The core is assembled as a server does it and turned by hand; requests travel over real sockets. Its clock stands
still, so that nothing is done because time has passed. What libraries do is not counted, be they Python or not.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import lmcache
from lmcache.cache import open_cache
from lmcache.cache.base import Limits
from lmcache.config import ServerConfig
from lmcache.connectors.link import Address, Line, Link
from lmcache.connectors.session import SchedulerSession
from lmcache.keys import KEY_BYTES
from lmcache.metrics import Counters
from lmcache.server import assembly
from lmcache.server.core import Ends
from lmcache.server.growth import Growth
from lmcache.server.sessions import Sessions
from lmcache.system import SystemEntropy, SystemFiles
from lmcache.wire import messages as m
from lmcache.wire.door import Door
from lmcache.wire.local import LocalListener
from lmcache.wire.poller import Poller
from lmcache.wire.tcp import TcpListener
from lmcache.wire.unix_listener import UnixListener

OURS = os.path.dirname(lmcache.__file__) + os.sep
EXTENT_BYTES = 64 << 10
ENTRIES_MAX = 1024
ANSWER_S = 60.0


class Tally:
    """Bytecode instructions of our modules that are executed while it is entered, on this thread."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Tally:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Callable[..., Any] | None:
        del arg
        if event == "call":
            if not frame.f_code.co_filename.startswith(OURS):
                return None
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        elif event == "opcode":
            self.count += 1
        return self._trace


class StillClock:
    """A moment that does not pass."""

    def now(self) -> float:
        return 1000.0


class _NoService:
    """In the supervisor's place: there is no service process, and none is started."""

    token = b""
    restart_at = None

    def fileno(self) -> None:
        return None


def some_keys(number: int, first: int = 0) -> list[bytes]:
    """Keys of chunks that are numbered so."""
    return [index.to_bytes(KEY_BYTES, "big") for index in range(first, first + number)]


class World:
    """A core with room for ``ENTRIES_MAX`` chunks, a worker's line, and a session of a scheduler."""

    def __init__(self, stack: contextlib.ExitStack, folder: Path) -> None:
        clock, counters = StillClock(), Counters()
        self.sessions = Sessions(SystemEntropy())
        self.poller = Poller()
        stack.callback(self.poller.close)
        tcp = TcpListener("tcp://127.0.0.1:*")
        stack.callback(tcp.close)
        door = Door(str(folder / "attach"))
        stack.callback(door.close)
        entry = UnixListener(str(folder / "attach.rpc"), None)
        stack.callback(entry.close)
        local = LocalListener(entry, self.poller)
        stack.callback(local.close)
        wake, waker = socket.socketpair()
        stack.callback(wake.close)
        stack.callback(waker.close)
        self.cache = open_cache(
            str(folder / "pool"),
            ENTRIES_MAX * EXTENT_BYTES,
            256,
            policy="LRU",
            persist=False,
            files=SystemFiles(),
            clock=clock,
            entropy=SystemEntropy(),
            limits=Limits(leased_share=1.0),
        )
        stack.callback(lambda: self.cache.close(persist=False))
        self.cache.pool.grow(ENTRIES_MAX * EXTENT_BYTES)
        plan = assembly.Plan(ServerConfig(instance_id="regress"), str(folder / "attach"), None, tcp.endpoint)
        self.core = assembly._core(
            plan,
            Ends(tcp, local, door, wake, self.poller),
            self.cache,
            self.sessions,
            counters,
            _NoService(),  # type: ignore[arg-type]
            Growth(self.cache.pool, lambda: None),
            clock,  # type: ignore[arg-type]
        )
        self.poller.watch_socket(tcp.socket)
        self.poller.watch(door.fileno())
        stack.callback(self._show_all_out)
        port = int(tcp.endpoint.rpartition(":")[2])
        self.line = self._attach(stack, port, "worker").line
        asker = self._attach(stack, port, "scheduler")
        self.session = SchedulerSession(asker)
        self.asking = asker.line

    def _attach(self, stack: contextlib.ExitStack, port: int, role: str) -> Link:
        is_worker = role == "worker"

        def registration(_: int) -> m.Register:
            extent_bytes = EXTENT_BYTES if is_worker else 0
            return m.Register(0, role=role, model="m", engine="e", rank=0, world_size=1, extent_bytes=extent_bytes)

        num_before = self._num_registered()
        link = Link(Address("tcp://127.0.0.1", port), role, is_worker, registration)
        stack.callback(link.close)
        while self._num_registered() == num_before:
            self.core.turn()
        link.wait_first_try(ANSWER_S)
        assert link.line is not None
        stack.callback(link.line.client.close)
        return link

    def _show_all_out(self) -> None:
        for instance in self.sessions.instances():
            instance.visitor.close()

    def _num_registered(self) -> int:
        return sum(instance.registration is not None for instance in self.sessions.instances())

    def call(self, line: Line, request: m.Request) -> tuple[m.Reply, int, int]:
        """The reply, and the instructions that the core and the client executed for it."""
        with Tally() as clients:
            request_id = line.client.send(request)
        with Tally() as core:
            self.core.turn()
        with Tally() as reading:
            assert line.client.poll(ANSWER_S)
            (reply,) = line.client.receive()
        assert reply.id == request_id
        return reply, core.count, clients.count + reading.count

    def hold(self, keys: list[bytes]) -> tuple[int, int]:
        """Store chunks; the core's instructions for the Reserve and for the Commit."""
        granted, reserving, _ = self.call(self.line, m.Reserve(0, keys=b"".join(keys)))
        assert isinstance(granted, m.Granted)
        checksums = array("Q", range(granted.states.count(m.GRANTED)))
        committed, committing, _ = self.call(
            self.line, m.Commit(0, ticket=granted.ticket, checksums=checksums.tobytes())
        )
        assert committed == m.Committed(committed.id, len(keys))
        return reserving, committing

    def look_up(self, keys: list[bytes]) -> tuple[int, int]:
        """The core's instructions for a Lookup, and the number of chunks that it found; the lease is ended."""
        found, looking, _ = self.call(self.asking, m.Lookup(0, keys=b"".join(keys), promote=True))
        assert isinstance(found, m.Found)
        if found.lease:
            self.call(self.asking, m.Release(0, lease=found.lease))
        return looking, found.num_chunks

    def ask(self, keys: list[bytes]) -> int:
        """Instructions that a scheduler's session executes for a question, until it has the answer."""
        with Tally() as asking:
            question = self.session.ask(keys)
        assert question is not None
        self.core.turn()
        assert question.line.client.poll(ANSWER_S)
        with Tally() as polling:
            assert self.session.poll(question)
        assert question.answer is not None
        assert question.answer.num_chunks == len(keys)
        self.session.release(question.answer)
        self.core.turn()
        assert question.line.client.poll(ANSWER_S)
        self.session.pump()
        return asking.count + polling.count


@contextlib.contextmanager
def world(folder: Path) -> Iterator[World]:
    """A world of its own."""
    with contextlib.ExitStack() as stack:
        made = World(stack, folder)
        yield made
        made.session.close()
