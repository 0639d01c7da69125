"""A client of the core, for use by one thread: it waits only when asked to."""

from __future__ import annotations

import socket
import time
from collections import deque
from typing import Protocol

import msgspec

from lmcache.errors import PeerRefused, PeerSilent
from lmcache.wire import codec
from lmcache.wire.messages import IN_FLIGHT_MAX, REFUSED_VERSION, Refused, Reply, Request
from lmcache.wire.stream import Stream
from lmcache.wire.tcp import Dealer

LOCAL_SCHEME = "unix://"
"""Begins the endpoints that are paths of this machine."""


class _Line(Protocol):
    """What carries frames: ``stream.Stream`` or ``tcp.Dealer``."""

    @property
    def is_over(self) -> bool: ...
    def send(self, frame: bytes) -> bool: ...
    def receive(self, timeout_s: float = 0.0) -> bytes | None: ...
    def close(self) -> None: ...


class Client:
    """A client of one server: "unix:///a/path" on this machine, or "tcp://host:port".

    ``send`` and ``receive`` never block; ``call`` is the two of them with a deadline. Requests are numbered here: the
    ``id`` they are made with is ignored. A connection by tcp is made anew when it is lost; of one by path the server's
    end is the end (``is_over``).
    """

    def __init__(self, endpoint: str) -> None:
        """Raises PeerSilent: nobody listens at that path; WireError: no endpoint."""
        self._line: _Line = _connect(endpoint) if endpoint.startswith(LOCAL_SCHEME) else Dealer(endpoint)
        self._last_id = 0
        self._pending: set[int] = set()
        self._inbox: deque[Reply] = deque()
        self._stranger: str | None = None  # why the other end cannot be understood: it speaks another wire version

    @property
    def is_over(self) -> bool:
        """Whether the server has ended the conversation, for good."""
        return self._line.is_over

    def send(self, request: Request) -> int:
        """Send without waiting; returns the id that its reply will carry.

        Raises:
            PeerSilent: the server cannot be reached now, or too many requests are unanswered.
        """
        if len(self._pending) >= IN_FLIGHT_MAX:
            raise PeerSilent(f"{IN_FLIGHT_MAX} requests are unanswered")
        request_id = self._last_id + 1
        request = msgspec.structs.replace(request, id=request_id)
        if self.is_over or not self._line.send(codec.encode(request)):
            raise PeerSilent("the server ended the conversation" if self.is_over else "the server cannot be reached")
        self._last_id = request_id
        self._pending.add(request_id)
        return request_id

    def forget(self, request_id: int) -> None:
        """Give a request up: its reply, should it come, is dropped."""
        self._pending.discard(request_id)

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Wait at most ``timeout_s`` seconds for a message; ``receive`` may still drop it and return nothing. False at
        once when the conversation ``is_over``."""
        return bool(self._inbox) or self._receive_one(timeout_s)

    def receive(self) -> list[Reply]:
        """Replies that are here, oldest first, ``Refused`` among them; ask again until there are none. Never waits."""
        for _ in range(0 if self._inbox else IN_FLIGHT_MAX):
            if not self._receive_one():
                break
        replies = list(self._inbox)
        self._inbox.clear()
        return replies

    def call(self, request: Request, timeout_s: float) -> Reply:
        """Send and wait for this request's reply; other replies are kept for ``receive``.

        Raises:
            PeerSilent: no reply within ``timeout_s`` seconds, or the conversation is over.
            PeerRefused: the server said no, or all it says is in another wire version; a code and a sentence.
        """
        deadline = time.monotonic() + timeout_s
        request_id = self._send_until(request, deadline)
        try:
            while (left_s := deadline - time.monotonic()) > 0 and not self.is_over:
                if self._receive_one(left_s) and self._inbox and self._inbox[-1].id == request_id:
                    reply = self._inbox.pop()
                    if isinstance(reply, Refused):
                        raise PeerRefused(reply.code, reply.message)
                    return reply
            if self._stranger is not None:
                raise PeerRefused(REFUSED_VERSION, self._stranger)
            if self.is_over:
                raise PeerSilent("the server ended the conversation")
            raise PeerSilent(f"no answer within {timeout_s:g} s")
        finally:
            self.forget(request_id)

    def close(self) -> None:
        """End the conversation; what waits to be sent is dropped. May be called twice."""
        self._line.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_until(self, request: Request, deadline: float) -> int:
        """Send as soon as the connection stands, which takes tcp a moment after the beginning."""
        while True:
            try:
                return self.send(request)
            except PeerSilent:
                left_s = deadline - time.monotonic()
                if len(self._pending) >= IN_FLIGHT_MAX or left_s <= 0 or not isinstance(self._line, Dealer):
                    raise
                self._line.wait_open(left_s)

    def _receive_one(self, timeout_s: float = 0.0) -> bool:
        """Take one message into the inbox if it answers one of ours; False when there is none within that time."""
        frame = self._line.receive(timeout_s)
        if frame is None:
            return False
        try:
            reply = codec.decode_reply(frame)
        except codec.MalformedFrame as error:
            if error.code == REFUSED_VERSION:
                self._stranger = str(error)
            return True
        if reply.id in self._pending:
            self._pending.discard(reply.id)
            self._inbox.append(reply)
        return True


def _connect(endpoint: str) -> Stream:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)  # a full queue of a stopped server is an error then, and no wait
        connection.connect(endpoint.removeprefix(LOCAL_SCHEME))
    except OSError as error:
        connection.close()
        raise PeerSilent(f"nobody answers at {endpoint}: {error.strerror or error}") from None
    return Stream(connection)
