"""Unix stream sockets between simulated processes, and what waits on them.

``Unix`` is the attach socket, a socket pair: what is sent arrives. ``StreamEnd`` carries the frames of attached
processes: the network's faults are drawn for each call of ``send``, which is one frame of ``wire.stream.Stream`` as
long as the socket takes whole frames.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable

from .kernel import Kernel, Process, check_alive
from .network import Network, Signal
from .strands import block

READABLE, WRITABLE = 1, 4
"""As ``select.POLLIN`` and ``select.POLLOUT``."""


class Unix:
    """One end of a unix stream socket: bytes, descriptors, and the end of the other process."""

    def __init__(self, kernel: Kernel, process: Process, *, delay: bool = True) -> None:
        self.kernel = kernel
        self.process = process
        self.other: Unix | None = None
        self.data = bytearray()
        self.fds: list[int] = []
        self.is_over = False  # the other end was closed
        self.is_closed = False
        self.changed = Signal()
        self._delay = delay
        self._number = next(kernel.serials)
        process.at_exit.append(self.close)

    @classmethod
    def pair(cls, kernel: Kernel, one: Process, two: Process, *, delay: bool = True) -> tuple[Unix, Unix]:
        """Two ends."""
        ends = cls(kernel, one, delay=delay), cls(kernel, two, delay=delay)
        ends[0].other, ends[1].other = ends[1], ends[0]
        return ends

    def fileno(self) -> int:
        """A number of no real descriptor."""
        return 2_000_000 + self._number

    def setblocking(self, value: bool) -> None:
        """Never blocks."""

    def is_readable(self) -> bool:
        """Whether there are bytes, or the other end is gone."""
        return bool(self.data) or self.is_over

    def is_writable(self) -> bool:
        """It takes everything."""
        return True

    def recv(self, num_bytes: int, flags: int = 0) -> bytes:
        """What is there."""
        if self.is_closed:
            raise OSError("closed")
        if self.data:
            part = bytes(self.data[:num_bytes])
            if not flags:
                del self.data[:num_bytes]
            return part
        if self.is_over:
            return b""
        raise BlockingIOError

    def send(self, data: bytes, flags: int = 0, fds: tuple[int, ...] = ()) -> int:
        """Bytes, with descriptors beside them."""
        del flags
        other = self.other
        if self.is_closed or other is None or other.is_closed:
            raise BrokenPipeError
        self._later(lambda: other._arrive(data, fds))
        return len(data)

    def _arrive(self, data: bytes, fds: tuple[int, ...]) -> None:
        self.data += data
        self.fds += fds
        self.process.has_news = True
        self.changed.set()

    def close(self) -> None:
        """The other end sees the end."""
        if self.is_closed:
            return
        self.is_closed = True
        other = self.other
        if other is not None and self._delay:
            # Not before what the process has said elsewhere: without simulated delays that would be there already.
            when = max(self.kernel.now + 0.0001, self.process.said_at)
            self.kernel.at(when, f"unix socket of {self.process.name}", other._end)
        elif other is not None:
            other._end()

    def _end(self) -> None:
        self.is_over = True
        self.process.has_news = True
        self.changed.set()

    def _later(self, action: Callable[[], None]) -> None:
        if self._delay:
            self.kernel.after(0.0001, f"unix socket of {self.process.name}", action)
        else:
            action()


class StreamEnd(Unix):
    """One end of a connection to an ``Entry``."""

    other: StreamEnd  # None until it is connected

    def __init__(self, network: Network, process: Process) -> None:
        super().__init__(network.kernel, process)
        self._network = network
        self._client = self  # the end that connected
        self._is_broken = False
        self.waits = False  # for room: the last send did not take everything
        self._unread_bytes = 0  # were sent, and the other end has not read them
        self._last_at = 0.0  # when the last thing on its way arrives

    def connect(self, path: str) -> None:
        """Connect; who listens there accepts it later."""
        entry = self._network.entries.get(path)
        if entry is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
        self.other = theirs = StreamEnd(self._network, entry.process)
        theirs.other = theirs._client = self
        self._network.streams.append(self)
        entry.waiting.append(theirs)
        entry.process.has_news = True

    def is_writable(self) -> bool:
        """Whether a send takes something, or finds that nobody is there."""
        return self.is_over or self._room_bytes() > 0

    def _room_bytes(self) -> int:
        most = self._network.room_bytes
        return 1 << 30 if most is None else most - self._unread_bytes

    def send(self, data: bytes, flags: int = 0, fds: tuple[int, ...] = ()) -> int:
        """One frame, unless there is no room for it."""
        del flags
        assert not fds
        network, kernel = self._network, self.kernel
        faults = network.faults
        if self.is_closed or self._is_broken or self.other.is_closed:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        if faults.disconnect and kernel.chance(faults.disconnect):
            self.sever()
            return len(data)
        if faults.drop and kernel.chance(faults.drop):
            kernel.trace("message dropped")
            return len(data)
        num_bytes = min(len(data), self._room_bytes())
        if faults.partial and kernel.chance(faults.partial):
            num_bytes = kernel.random.randint(0, num_bytes)
        self.waits = num_bytes < len(data)
        if self.waits:
            end = "client" if self is self._client else "core"
            network.counts[f"parts of frames by the {end}"] += 1
        if not num_bytes:
            raise BlockingIOError
        part = bytes(data[:num_bytes])
        for _ in range(2 if faults.duplicate and kernel.chance(faults.duplicate) else 1):
            when = kernel.now + network.delay_s()
            if not (faults.reorder and kernel.chance(faults.reorder)):
                when = self._last_at = max(self._last_at, when)
            self._unread_bytes += num_bytes
            self.process.said_at = max(self.process.said_at, when)
            kernel.at(when, f"bytes to {self.other.process.name}", lambda: self._deliver(part))
        return num_bytes

    def _deliver(self, data: bytes) -> None:
        if not self._is_broken and not self.other.is_closed:
            self.other._arrive(data, ())

    def recv(self, num_bytes: int, flags: int = 0) -> bytes:
        """What is there; the other end has room again."""
        part = super().recv(num_bytes, flags)
        other = self.other
        other._unread_bytes -= len(part)
        if part and other.waits:
            other.waits = False
            other._notify()
        return part

    def _notify(self) -> None:
        self.process.has_news = True
        self.changed.set()

    def close(self) -> None:
        """The other end sees the end after all that was sent."""
        if self.is_closed:
            return
        self.is_closed = True
        if self._client in self._network.streams:
            self._network.streams.remove(self._client)
        if self.other is not None:
            self._last_at = max(self._last_at, self.kernel.now + 0.0001)
            self.kernel.at(self._last_at, f"end of a connection to {self.other.process.name}", self.other._end)

    def sever(self) -> None:
        """The connection is gone, with all that was on its way; both ends see the end."""
        client = self._client
        if client not in self._network.streams:
            return
        self._network.streams.remove(client)
        self.kernel.trace(f"connection of {client.process.name} broke")
        for end in (client, client.other):
            end._is_broken = True
            end._end()


class Entry:
    """In place of ``wire.unix_listener.UnixListener``: who has connected and was not accepted yet."""

    def __init__(self, network: Network, path: str) -> None:
        self.process = check_alive()
        self.waiting: deque[StreamEnd] = deque()
        self._entries = network.entries
        self._path = path
        network.entries[path] = self
        self.process.at_exit.append(self.close)

    def fileno(self) -> int:
        """A number of no real descriptor."""
        return 1_999_997

    def is_readable(self) -> bool:
        """Whether somebody waits."""
        return bool(self.waiting)

    def accept(self) -> StreamEnd | None:
        """The next connection, or None."""
        return self.waiting.popleft() if self.waiting else None

    def close(self) -> None:
        """Nobody listens here any more."""
        if self._entries.get(self._path) is self:
            del self._entries[self._path]
        while self.waiting:
            self.waiting.popleft().close()


class Poll:
    """``select.poll`` over sockets of ours."""

    def __init__(self) -> None:
        self._masks: dict[Unix, int] = {}

    def register(self, socket: Unix, mask: int) -> None:
        """Wait for this, too."""
        self._masks[socket] = mask

    def modify(self, socket: Unix, mask: int) -> None:
        """Wait for something else of it."""
        assert socket in self._masks, "a socket that is not registered is an error"
        self._masks[socket] = mask

    def poll(self, timeout_ms: float | None) -> list[int]:
        """Wait until one of them is ready."""
        changed = Signal()
        masks = self._masks
        for socket in masks:
            socket.changed = changed

        def is_ready() -> bool:
            return any(
                socket.is_closed or socket.is_readable() or (mask & WRITABLE and socket.is_writable())
                for socket, mask in masks.items()
            )

        block(lambda: changed.wait(None if timeout_ms is None else timeout_ms / 1000, is_ready))
        return []


class Reader:
    """As ``asyncio.StreamReader``."""

    def __init__(self, end: StreamEnd) -> None:
        self._end = end
        self._data = bytearray()

    async def readexactly(self, num_bytes: int) -> bytes:
        """Wait for so many bytes."""
        while len(self._data) < num_bytes:
            await self._end.changed.wait(None, lambda: self._end.is_closed or self._end.is_readable())
            part = self._end.recv(1 << 16)
            if not part:
                raise asyncio.IncompleteReadError(bytes(self._data), num_bytes)
            self._data += part
        data = bytes(self._data[:num_bytes])
        del self._data[:num_bytes]
        return data


class Writer:
    """As ``asyncio.StreamWriter``: keeps what the socket does not take, and sends it later, also after ``close``."""

    def __init__(self, end: StreamEnd) -> None:
        self._end = end
        self._unsent = bytearray()
        self._is_lost = False
        self._is_closing = False

    def write(self, data: bytes) -> None:
        """Send, or keep."""
        if self._is_lost or self._is_closing:
            return
        waits = bool(self._unsent)
        self._unsent += data
        if not waits:
            self._push()
            if self._unsent:
                self._end.process.spawn(self._push_on())

    def _push(self) -> None:
        try:
            del self._unsent[: self._end.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:
            self._is_lost = True
            self._unsent.clear()

    async def _push_on(self) -> None:
        while self._unsent:
            await self._end.changed.wait(None, self._end.is_writable)
            self._push()
        if self._is_closing:
            self._end.close()

    async def drain(self) -> None:
        """Raises ConnectionResetError: nobody is there."""
        if self._is_lost:
            raise ConnectionResetError("Connection lost")

    def close(self) -> None:
        """End it when everything is sent."""
        self._is_closing = True
        if not self._unsent:
            self._end.close()


async def open_connection(network: Network, path: str) -> tuple[Reader, Writer]:
    """As ``asyncio.open_unix_connection``."""
    end = StreamEnd(network, check_alive())
    end.connect(path)
    return Reader(end), Writer(end)
