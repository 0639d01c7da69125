"""One connection to a Redis or Valkey server, on which values travel between the socket and the caller's memory.

redis-py connects, speaks TLS and logs in (``redis_pool.py``); then its socket is ours, without blocking, on the event
loop: the library has no way to send a value in parts or to receive one into memory that exists. What is spoken is
RESP2. A thread for each call instead was tried: at 256 KiB a value, handing over took as long as the transfer.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lmcache.errors import TierError

Address = tuple[str, int]
"""Host and port; a path and 0 for a unix socket."""

BUFFER_BYTES = 16 << 10  # also the longest line that a server may send
BULK_BYTES_MAX = 4 << 20  # of replies that are not objects
ITEMS_MAX, DEPTH_MAX = 1 << 16, 8  # of replies that are lists
DRAIN_BYTES_MAX = 1 << 20  # beyond that a new connection is cheaper than reading what nobody wants
BUFFERS_MAX = 512  # in one sendmsg; Linux takes 1024
PIECE_BYTES = 1 << 20  # moved before the event loop gets its turn: 0.2 to 0.6 ms
REPLIES_MAX = 256  # read before that


class Lost(TierError):
    """The connection broke: on one that was idle before, worth a second try on a new one."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error reply. ``code`` is its first word."""

    code: str
    sentence: str


Reply = bytes | int | None | Refusal | list["Reply"]


def command(*words: bytes) -> bytes:
    """A request as the server reads it."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


def named(address: Address) -> str:
    """An address for people."""
    host, port = address
    if not port:
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Link:
    """A connection that one call uses at a time."""

    def __init__(self, connection: Any, address: Address) -> None:
        self.address = address
        self.spent = False  # an unread reply is on its way, or the server hung up: not for another call
        self._connection = connection
        self._socket: socket.socket = connection._sock  # the only way to it, in all versions of the library
        self._socket.setblocking(False)
        self._sealed = isinstance(self._socket, ssl.SSLSocket)
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[None] | None = None
        self._watched = self._expired = self._ended = self._wants_write = False
        self._deadline = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._buffer = bytearray(BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0

    def begin(self, deadline: float) -> None:
        """A call starts, which must be over at that time of the loop."""
        self._deadline = deadline
        self._expired = False
        if self._timer is None:
            self._timer = self._loop.call_at(deadline, self._expire)

    def end(self) -> None:
        """Let the call that uses it fail; that call closes it."""
        self._ended = True
        self._wake()

    def close(self) -> None:
        """Disconnect."""
        if self._watched:
            self._loop.remove_reader(self._socket)
            self._watched = False
        if self._timer is not None:
            self._timer.cancel()
        self._connection.disconnect()

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send buffers one behind the other, neither joined nor copied."""
        views = [memoryview(buffer) for buffer in buffers]
        first = unpaused_bytes = 0
        while first < len(views):
            try:
                sent = self._send(views, first)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
                await self._wait(writable=not isinstance(error, ssl.SSLWantReadError))
                unpaused_bytes = 0
                continue
            except OSError as error:
                raise self._lost(error) from None
            unpaused_bytes += sent
            while first < len(views) and sent >= len(views[first]):
                sent -= len(views[first])
                first += 1
            if sent:
                views[first] = views[first][sent:]
            if unpaused_bytes >= PIECE_BYTES and first < len(views):
                await self._pause()
                unpaused_bytes = 0

    async def ask(self, *words: bytes) -> Reply:
        """One request and its reply."""
        await self.send([command(*words)])
        return await self.reply()

    async def ask_all(self, requests: Sequence[bytes]) -> list[Reply]:
        """Many requests sent together, and their replies."""
        await self.send([b"".join(requests)])
        replies: list[Reply] = []
        while len(replies) < len(requests):
            if replies and len(replies) % REPLIES_MAX == 0:
                await self._pause()
            replies.append(await self.reply())
        return replies

    async def reply(self, depth: int = 0) -> Reply:
        """The next reply, whatever it is."""
        line = await self._line()
        mark, rest = line[:1], line[1:]
        if mark == b"+":
            return rest
        if mark == b"-":
            return _refusal(rest)
        if mark not in (b":", b"$", b"*"):
            self._nonsense()
        number = self._number(rest)
        if mark == b":":
            return number
        if number == -1:
            return None
        if mark == b"*":
            if not 0 <= number <= ITEMS_MAX or depth == DEPTH_MAX:
                self._nonsense()
            return [await self.reply(depth + 1) for _ in range(number)]
        if not 0 <= number <= BULK_BYTES_MAX:
            self._nonsense()
        data = bytearray(number)
        await self._fill(memoryview(data))
        await self._end_of_value()
        return bytes(data)

    async def value_into(self, parts: Sequence[memoryview]) -> bool | Refusal:
        """The reply of GET, received into ``parts``; False where there is no value or one of another length."""
        line = await self._line()
        if line[:1] == b"-":
            return _refusal(line[1:])
        if line[:1] != b"$":
            self._nonsense()
        length = self._number(line[1:])
        if length == -1:
            return False
        if length != sum(map(len, parts)):
            if 0 <= length <= DRAIN_BYTES_MAX:
                await self._fill(memoryview(bytearray(length)))
                await self._end_of_value()
            else:
                self.spent = True
            return False
        for part in parts:
            await self._fill(part)
        await self._end_of_value()
        return True

    def _send(self, views: list[memoryview], first: int) -> int:
        if self._sealed or first + 1 == len(views) or len(views[first]) >= PIECE_BYTES:
            return self._socket.send(views[first][:PIECE_BYTES])
        return self._socket.sendmsg(_up_to(views, first, PIECE_BYTES))

    async def _fill(self, view: memoryview) -> None:
        """Receive exactly ``view``; first what came along with the line before it."""
        filled = min(len(view), self._end - self._start)
        view[:filled] = self._view[self._start : self._start + filled]
        self._start += filled
        paused_at = filled
        while filled < len(view):
            filled += await self._receive(view[filled : filled + PIECE_BYTES])
            if filled - paused_at >= PIECE_BYTES and filled < len(view):
                await self._pause()
                paused_at = filled

    async def _end_of_value(self) -> None:
        if await self._line():
            self._nonsense()

    async def _line(self) -> bytes:
        while (line := self._read_line()) is None:
            left = self._end - self._start
            if left == BUFFER_BYTES:
                self._nonsense()
            self._view[:left] = bytes(self._view[self._start : self._end])
            self._start, self._end = 0, left
            self._end += await self._receive(self._view[left:])
        return line

    def _read_line(self) -> bytes | None:
        """A line that is here already."""
        at = self._buffer.find(b"\r\n", self._start, self._end)
        if at < 0:
            return None
        line = bytes(self._view[self._start : at])
        self._start = at + 2
        return line

    async def _receive(self, view: memoryview) -> int:
        while (count := self._receive_now(view)) is None:
            await self._wait(writable=self._wants_write)
        return count

    def _receive_now(self, view: memoryview) -> int | None:
        """What has arrived; None where nothing has."""
        try:
            count = self._socket.recv_into(view)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError) as error:
            self._wants_write = isinstance(error, ssl.SSLWantWriteError)
            return None
        except OSError as error:
            raise self._lost(error) from None
        if not count:
            raise self._lost(None)
        return count

    async def _wait(self, writable: bool) -> None:
        self._check()
        self._waiter = self._loop.create_future()
        if writable:
            self._loop.add_writer(self._socket, self._wake)
        elif not self._watched:
            self._loop.add_reader(self._socket, self._readable)
            self._watched = True
        try:
            await self._waiter
        finally:
            self._waiter = None
            if writable:
                self._loop.remove_writer(self._socket)
        self._check()

    async def _pause(self) -> None:
        await asyncio.sleep(0)
        self._check()

    def _check(self) -> None:
        if self._ended:
            raise self._lost(None)
        if self._expired:
            raise TierError(f"{named(self.address)} did not answer in time")

    def _readable(self) -> None:
        if self._waiter is None:
            # between calls that is the server hanging up; in a call we shall see anyway
            self._loop.remove_reader(self._socket)
            self._watched = False
        self._wake()

    def _expire(self) -> None:
        # set once for many calls: what one call leaves behind is the next one's
        if self._loop.time() < self._deadline:
            self._timer = self._loop.call_at(self._deadline, self._expire)
        else:
            self._timer = None
            self._expired = True
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _number(self, digits: bytes) -> int:
        if not (digits.removeprefix(b"-").isdigit() and len(digits) <= 20):
            self._nonsense()
        return int(digits)

    def _lost(self, error: OSError | None) -> Lost:
        reason = (error.strerror if error else None) or "it was closed"
        return Lost(f"the connection to {named(self.address)} was lost: {reason}")

    def _nonsense(self) -> NoReturn:
        raise TierError(f"{named(self.address)} answered something that is not the Redis protocol")


def _up_to(views: list[memoryview], first: int, num_bytes: int) -> list[memoryview]:
    """The next views, as many as are wanted at once."""
    taken: list[memoryview] = []
    for view in views[first : first + BUFFERS_MAX]:
        taken.append(view[:num_bytes])
        num_bytes -= len(view)
        if num_bytes <= 0:
            break
    return taken


def _refusal(line: bytes) -> Refusal:
    sentence = "".join(letter for letter in line.decode("utf-8", "replace") if letter.isprintable())[:200]
    return Refusal(sentence.partition(" ")[0], sentence)
