"""What all connections have in common, and ZMQ: every message takes a while, and faults are drawn for each.

A connection keeps the order of its messages and loses some only when it breaks; ``Faults`` can make the network worse
than that (drop, duplicate, reorder), so that what the protocol relies on is seen.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import zmq

from .kernel import Kernel, Process, check_alive
from .strands import block

if TYPE_CHECKING:
    from .sockets import Entry, StreamEnd

DELAY_S = (0.00002, 0.002)
RECONNECT_S = (0.05, 0.5)


@dataclass
class Faults:
    """Probability of each, for one message."""

    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    slow: float = 0.0
    slow_s: float = 1.5
    disconnect: float = 0.0
    partial: float = 0.0  # a socket takes a part of what could be sent, or nothing

    def is_lossy(self) -> bool:
        """Whether messages get lost, doubled or reordered inside of a connection that stands."""
        return bool(self.drop or self.duplicate or self.reorder)


class Signal:
    """Wakes who waits for something to change."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[None]] = []

    def set(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future in waiting:
            if not future.done() and not future.get_loop().is_closed():
                future.set_result(None)

    async def wait(self, timeout_s: float | None, until: Callable[[], bool]) -> bool:
        """Wait until a condition holds; whether it does."""
        loop = asyncio.get_running_loop()
        deadline = None if timeout_s is None else loop.time() + timeout_s
        while not until():
            left_s = None if deadline is None else deadline - loop.time()
            if left_s is not None and left_s <= 0:
                return False
            future = loop.create_future()
            self._waiting.append(future)
            await asyncio.wait([future], timeout=left_s)
        return True


class Network:
    """All endpoints, and all connections that stand.

    ``room_bytes``: what a stream socket takes that its other end has not read, None for any number.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.faults = Faults()
        self.room_bytes: int | None = None
        self.routers: dict[str, Socket] = {}
        self.pipes: list[Pipe] = []
        self.num_identities = 0
        self.entries: dict[str, Entry] = {}
        self.streams: list[StreamEnd] = []  # the ends that connected
        self.counts: Counter[str] = Counter()

    def delay_s(self) -> float:
        """How long a message takes."""
        kernel = self.kernel
        if self.faults.slow and kernel.chance(self.faults.slow):
            return kernel.random.uniform(0.1, self.faults.slow_s)
        return kernel.random.uniform(*DELAY_S)

    def break_one(self) -> None:
        """Break a connection: what is on its way is lost, and its client connects anew."""
        connections: list[Pipe | StreamEnd] = [*self.pipes, *self.streams]
        if connections:
            self.kernel.random.choice(connections).sever()


class Pipe:
    """One connection between a DEALER and a ROUTER."""

    def __init__(self, network: Network, client: Socket, server: Socket) -> None:
        network.num_identities += 1
        self.identity = b"\0" + network.num_identities.to_bytes(4, "big")
        self.network = network
        self.client = client
        self.server = server
        self.stands = True
        self._last = [0.0, 0.0]
        server.peers[self.identity] = self
        client.pipe = self
        network.pipes.append(self)
        client.changed.set()

    def send(self, frame: bytes, *, to_server: bool) -> None:
        """Put a message on its way."""
        network, kernel = self.network, self.network.kernel
        faults = network.faults
        if faults.disconnect and kernel.chance(faults.disconnect):
            self.sever()
            return
        if faults.drop and kernel.chance(faults.drop):
            kernel.trace("message dropped")
            return
        copies = 2 if faults.duplicate and kernel.chance(faults.duplicate) else 1
        for _ in range(copies):
            when = kernel.now + network.delay_s()
            if not (faults.reorder and kernel.chance(faults.reorder)):
                when = self._last[to_server] = max(self._last[to_server], when)
            target = self.server if to_server else self.client
            kernel.at(when, f"message to {target.process.name}", lambda: self._arrive(frame, to_server))

    def _arrive(self, frame: bytes, to_server: bool) -> None:
        if not self.stands:
            return
        if to_server:
            self.server.inbox.append((self.identity, frame))
            self.server.process.has_news = True
        else:
            self.client.inbox.append(frame)
            self.client.changed.set()

    def sever(self) -> None:
        """The connection is gone, with all that was on its way."""
        if not self.stands:
            return
        self.stands = False
        self.network.pipes.remove(self)
        self.server.peers.pop(self.identity, None)
        self.client.pipe = None
        self.network.kernel.trace(f"connection of {self.client.process.name} broke")
        self.client.connect_soon()


class Socket:
    """A DEALER or a ROUTER with the calls that our code makes."""

    def __init__(self, network: Network, kind: int) -> None:
        self.network = network
        self.process: Process = check_alive()
        self.kind = kind
        self.endpoint = ""
        self.pipe: Pipe | None = None
        self.peers: dict[bytes, Pipe] = {}
        self.inbox: deque[Any] = deque()
        self.changed = Signal()
        self.is_closed = False
        self._timeout_ms = -1
        self._to: bytes | None = None
        self.process.at_exit.append(self.close)

    def setsockopt(self, option: int, value: object) -> None:
        """Only a receive's timeout means anything here."""
        if option == zmq.RCVTIMEO:
            assert isinstance(value, int)
            self._timeout_ms = value

    def getsockopt_string(self, option: int) -> str:
        """Where it is bound."""
        del option
        return self.endpoint

    def bind(self, endpoint: str) -> None:
        """Listen."""
        self.endpoint = endpoint
        self.network.routers[endpoint] = self

    def connect(self, endpoint: str) -> None:
        """Connect, and again whenever the connection is lost."""
        self.endpoint = endpoint
        self.connect_soon(self.network.delay_s())

    def connect_soon(self, delay_s: float | None = None) -> None:
        """Try to connect after a while."""
        if delay_s is None:
            delay_s = self.network.kernel.random.uniform(*RECONNECT_S)
        self.network.kernel.after(delay_s, f"{self.process.name} connects", self._connect)

    def _connect(self) -> None:
        if self.is_closed or self.pipe is not None:
            return
        router = self.network.routers.get(self.endpoint)
        if router is None:
            self.connect_soon()
        else:
            Pipe(self.network, self, router)

    # --- sending

    def send(self, frame: bytes, flags: int = 0) -> None:
        """One part."""
        check_alive()
        if self.kind == zmq.ROUTER:
            self._send_part(frame, flags)
        elif self.pipe is None:
            raise zmq.Again
        else:
            self.pipe.send(frame, to_server=True)

    def _send_part(self, frame: bytes, flags: int) -> None:
        if flags & zmq.SNDMORE:
            if frame not in self.peers:
                raise zmq.ZMQError(zmq.EHOSTUNREACH)
            self._to = frame
        else:
            assert self._to is not None
            self.peers[self._to].send(frame, to_server=False)

    # --- receiving

    def recv_multipart(self, flags: int = 0, copy: bool = True) -> Any:
        """All parts of one message."""
        check_alive()
        if self.kind == zmq.ROUTER:
            if not self.inbox:
                raise zmq.Again
            identity, frame = self.inbox.popleft()
            return [identity, frame] if copy else [_Part(identity), _Part(frame)]
        if not self.inbox and not flags & zmq.DONTWAIT:
            block(lambda: self.changed.wait(self._timeout_ms / 1000, lambda: bool(self.inbox)))
        if not self.inbox:
            raise zmq.Again
        return [self.inbox.popleft()]

    def poll(self, timeout_ms: int, flags: int) -> bool:
        """Wait for a connection."""
        assert flags == zmq.POLLOUT
        return bool(block(lambda: self.changed.wait(timeout_ms / 1000, lambda: self.pipe is not None)))

    def close(self, linger: int = 0) -> None:
        """End it; a client's last messages arrive or do not."""
        del linger
        if self.is_closed:
            return
        self.is_closed = True
        if self.kind == zmq.ROUTER:
            if self.network.routers.get(self.endpoint) is self:
                del self.network.routers[self.endpoint]
            for pipe in list(self.peers.values()):
                pipe.sever()
        elif self.pipe is not None:
            pipe, kernel = self.pipe, self.network.kernel
            kernel.after(self.network.delay_s() if kernel.chance(0.5) else 0.0, "connection ends", pipe.sever)


class _Part:
    def __init__(self, data: bytes) -> None:
        self.buffer = data

    def get(self, name: str) -> str:
        assert name == "Peer-Address"
        return "127.0.0.1"


def zmq_standin(network: Network) -> SimpleNamespace:
    """A module that can stand for ``zmq``."""
    names = {name: getattr(zmq, name) for name in dir(zmq) if name.isupper()}
    return SimpleNamespace(
        **names,
        Again=zmq.Again,
        ZMQError=zmq.ZMQError,
        Socket=Socket,
        Context=lambda: SimpleNamespace(socket=lambda kind: Socket(network, kind), term=lambda: None),
    )
