"""The two ends of a conversation over ZMQ: a client that waits only when asked to, a listener that waits for nobody."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque

import msgspec
import zmq

from lmcache.errors import PeerRefused, PeerSilent, WireError
from lmcache.wire import codec
from lmcache.wire.messages import FRAME_BYTES_MAX, REFUSED_VERSION, Refused, Reply, Request

IN_FLIGHT_MAX = 1024
"""Requests of one client that may be unanswered at once."""

_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 5_000, 15_000
_HANDSHAKE_MS = 5_000
_BACKLOG = 512
_RECONNECT_MS, _RECONNECT_MAX_MS = 50, 500


class Client:
    """A client of one server, for use by one thread.

    ``send`` and ``receive`` never block; ``call`` is the two of them with a deadline. Requests are numbered here: the
    ``id`` they are made with is ignored. While the server cannot be reached nothing is queued, so no request is ever
    carried out long after its sender gave it up.
    """

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),
            (zmq.SNDHWM, IN_FLIGHT_MAX),
            (zmq.RCVHWM, IN_FLIGHT_MAX),
            (zmq.MAXMSGSIZE, FRAME_BYTES_MAX),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
        ):
            self._socket.setsockopt(option, value)
        if endpoint.startswith("tcp:"):
            _beat(self._socket)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise WireError(f"{endpoint!r} is not an endpoint: {error.strerror}") from None
        self._last_id = 0
        self._pending: set[int] = set()
        self._inbox: deque[Reply] = deque()
        self._stranger: str | None = None  # why the other end cannot be understood: it speaks another wire version

    def send(self, request: Request) -> int:
        """Send without waiting; returns the id that its reply will carry.

        Raises:
            PeerSilent: the server cannot be reached now, or too many requests are unanswered.
        """
        if len(self._pending) >= IN_FLIGHT_MAX:
            raise PeerSilent(f"{IN_FLIGHT_MAX} requests are unanswered")
        request_id = self._last_id + 1
        request = msgspec.structs.replace(request, id=request_id)
        try:
            self._socket.send(codec.encode(request), zmq.DONTWAIT)
        except zmq.Again:
            raise PeerSilent("the server cannot be reached") from None
        self._last_id = request_id
        self._pending.add(request_id)
        return request_id

    def forget(self, request_id: int) -> None:
        """Give a request up: its reply, should it come, is dropped."""
        self._pending.discard(request_id)

    def poll(self, timeout_s: float = 0.0) -> bool:
        """Wait at most ``timeout_s`` seconds for a message; ``receive`` may still drop it and return nothing."""
        if self._inbox:
            return True
        if timeout_s <= 0:
            return self._receive_one()
        # A blocking receive with a limit: half the cost of polling first.
        self._socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000) + 1)
        return self._receive_one(0)

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
            PeerSilent: no reply within ``timeout_s`` seconds.
            PeerRefused: the server said no, or all it says is in another wire version; a code and a sentence.
        """
        deadline = time.monotonic() + timeout_s
        request_id = self._send_until(request, deadline)
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                # A blocking receive with a limit: half the cost of polling first.
                self._socket.setsockopt(zmq.RCVTIMEO, int(left_s * 1000) + 1)
                if self._receive_one(0) and self._inbox and self._inbox[-1].id == request_id:
                    reply = self._inbox.pop()
                    if isinstance(reply, Refused):
                        raise PeerRefused(reply.code, reply.message)
                    return reply
            if self._stranger is not None:
                raise PeerRefused(REFUSED_VERSION, self._stranger)
            raise PeerSilent(f"no answer within {timeout_s:g} s")
        finally:
            self.forget(request_id)

    def close(self) -> None:
        """Drop everything unsent and end the connection. May be called twice."""
        self._socket.close(0)
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send_until(self, request: Request, deadline: float) -> int:
        """Send as soon as the connection stands, which takes a moment after ``connect``."""
        while True:
            try:
                return self.send(request)
            except PeerSilent:
                left_s = deadline - time.monotonic()
                if len(self._pending) >= IN_FLIGHT_MAX or left_s <= 0:
                    raise
                self._socket.poll(int(left_s * 1000) + 1, zmq.POLLOUT)

    def _receive_one(self, flags: int = zmq.DONTWAIT) -> bool:
        """Take one message from the socket into the inbox if it answers one of ours; False when there is none."""
        try:
            frames = self._socket.recv_multipart(flags)
        except zmq.Again:
            return False
        try:
            if len(frames) == 1:
                reply = codec.decode_reply(frames[0])
                if reply.id in self._pending:
                    self._pending.discard(reply.id)
                    self._inbox.append(reply)
        except codec.MalformedFrame as error:
            if error.code == REFUSED_VERSION:
                self._stranger = str(error)
        return True


class AddressInUse(WireError):
    """Somebody listens there already."""


class Peer(msgspec.Struct, frozen=True):
    """One connection: the listener's door it came through, and ZMQ's name for it."""

    door: int
    identity: bytes


class Received(msgspec.Struct, frozen=True, gc=False):
    """One message. ``frame`` is None when it had not exactly one part; ``address`` is an IP for tcp, None for ipc."""

    peer: Peer
    frame: bytes | None
    address: str | None


class Listener:
    """The server's end: one ROUTER socket ("door") per endpoint, so that one door's flood does not starve another's.

    The port of a tcp door is a socket of ours that zmq only accepts from, so that the door can be made anew without
    losing it.
    """

    def __init__(self) -> None:
        self._context = zmq.Context()
        self.doors: list[zmq.Socket[bytes]] = []
        self._ports: list[socket.socket | None] = []

    def bind(self, endpoint: str) -> str:
        """Open a door; returns its endpoint with the port that was taken.

        Raises:
            AddressInUse: the endpoint is taken.
            WireError: it is not ours to take, or no endpoint.
        """
        port: socket.socket | None = None
        try:
            if endpoint.startswith("tcp:"):
                port = _listen(endpoint)
            door = self._open(endpoint, port)
        except OSError as error:  # zmq's errors are, too
            if port is not None:
                port.close()
            kind = AddressInUse if error.errno == errno.EADDRINUSE else WireError
            raise kind(f"cannot listen on {endpoint}: {error.strerror or error}") from None
        self.doors.append(door)
        self._ports.append(port)
        return door.getsockopt_string(zmq.LAST_ENDPOINT)

    def reopen(self, door: int) -> bool:
        """Put another socket in a tcp door's place, on the same port. All its connections end, and what they had sent
        of messages that are not complete is freed. False where it is no tcp door.
        """
        port = self._ports[door]
        if port is None:
            return False
        old = self.doors[door]
        self.doors[door] = self._open(old.getsockopt_string(zmq.LAST_ENDPOINT), port)
        old.close(0)
        return True

    def _open(self, endpoint: str, port: socket.socket | None) -> zmq.Socket[bytes]:
        door: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.ROUTER_HANDOVER, 0),
            (zmq.SNDHWM, IN_FLIGHT_MAX),
            (zmq.RCVHWM, 64),
            (zmq.MAXMSGSIZE, FRAME_BYTES_MAX),
            (zmq.HANDSHAKE_IVL, _HANDSHAKE_MS),
            (zmq.BACKLOG, _BACKLOG),
        ):
            door.setsockopt(option, value)
        # Nobody answers for this domain, so whoever speaks ZMTP 3 may come in. Without it libzmq takes random bytes for
        # ZMTP 1, passes them on as messages, and aborts the process on some (assertion in zmtp_engine.cpp, 4.3.5).
        door.setsockopt(zmq.ZAP_DOMAIN, b"lmcache")
        if port is not None:
            _beat(door)
            door.setsockopt(zmq.IPV6, "[" in endpoint)
            door.setsockopt(zmq.USE_FD, port.dup().detach())  # zmq closes it
        try:
            door.bind(endpoint)
        except zmq.ZMQError:
            door.close(0)
            raise
        return door

    def receive(self, door: int) -> Received | None:
        """The next message of one door, or None. Never waits."""
        source = self.doors[door]
        try:
            if self._ports[door] is None:
                frames = source.recv_multipart(zmq.DONTWAIT)
                return Received(Peer(door, frames[0]), frames[1] if len(frames) == 2 else None, None)
            parts = source.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        frame = bytes(parts[1].buffer) if len(parts) == 2 else None
        return Received(Peer(door, bytes(parts[0].buffer)), frame, str(parts[0].get("Peer-Address")))

    def send(self, peer: Peer, reply: Reply) -> bool:
        """Answer without waiting; False when the peer is gone, or does not read and has too many answers waiting."""
        try:
            door = self.doors[peer.door]
            door.send(peer.identity, zmq.SNDMORE | zmq.DONTWAIT)
            door.send(codec.encode(reply), zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def close(self) -> None:
        """Close all doors; answers not yet sent are dropped."""
        for door in self.doors:
            door.close(0)
        self._context.term()
        for port in self._ports:
            if port is not None:
                port.close()


def _listen(endpoint: str) -> socket.socket:
    """A listening socket for an endpoint like "tcp://127.0.0.1:5555" or "tcp://[::1]:*" (a port that is free).

    Raises:
        OSError: there is no such address here, or it is taken.
    """
    host, _, number = endpoint.removeprefix("tcp://").rpartition(":")
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    number = "0" if number == "*" else number
    if not number.isdecimal() or int(number) > 0xFFFF:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    is_dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
    port = socket.create_server(
        (host.strip("[]"), int(number)), family=family, backlog=_BACKLOG, dualstack_ipv6=is_dual
    )
    # While a door is made anew two zmq sockets accept from it, and one of them finds nothing.
    port.setblocking(False)
    return port


def _beat(end: zmq.Socket[bytes]) -> None:
    """A tcp peer that vanished without a word is noticed."""
    end.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    end.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
