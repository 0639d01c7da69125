"""ZMQ over tcp: where strangers of this machine ask the way, and everybody else hears why not."""

from __future__ import annotations

import errno
import os
import socket

import msgspec
import zmq

from lmcache.errors import WireError
from lmcache.wire import codec
from lmcache.wire.messages import FRAME_BYTES_MAX, IN_FLIGHT_MAX, Reply
from lmcache.wire.peer import Received

_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 5_000, 15_000
_HANDSHAKE_MS = 5_000
_BACKLOG = 512
_RECONNECT_MS, _RECONNECT_MAX_MS = 50, 500


class AddressInUse(WireError):
    """Somebody listens there already."""


class Dealer:
    """A client's end. While the server cannot be reached nothing is queued, so no request is ever carried out long
    after its sender gave it up; the connection is made anew whenever it is lost.
    """

    is_over = False

    def __init__(self, endpoint: str) -> None:
        """Raises WireError: ``endpoint`` is none."""
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
        _beat(self._socket)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise WireError(f"{endpoint!r} is not an endpoint: {error.strerror}") from None

    def send(self, frame: bytes) -> bool:
        """Send without waiting; False: there is no connection now."""
        try:
            self._socket.send(frame, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def wait_open(self, timeout_s: float) -> None:
        """Wait at most so long until something can be sent."""
        self._socket.poll(int(timeout_s * 1000) + 1, zmq.POLLOUT)

    def receive(self, timeout_s: float = 0.0) -> bytes | None:
        """The next frame, waiting at most ``timeout_s`` seconds; empty for a message that is not one frame."""
        self._socket.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000) + 1 if timeout_s > 0 else 0)
        try:
            frames = self._socket.recv_multipart()
        except zmq.Again:
            return None
        return frames[0] if len(frames) == 1 else b""

    def close(self) -> None:
        """Drop everything unsent and end the connection. May be called twice."""
        self._socket.close(0)
        self._context.term()


class TcpPeer(msgspec.Struct, frozen=True):
    """One connection, by ZMQ's name for it."""

    listener: TcpListener
    identity: bytes

    def send(self, reply: Reply) -> bool:
        """Answer without waiting, see ``Peer``."""
        return self.listener.send(self.identity, reply)


class TcpListener:
    """The server's end, a ROUTER socket. Its port is a socket of ours that zmq only accepts from, so that the ROUTER
    can be made anew without losing it.
    """

    def __init__(self, endpoint: str) -> None:
        """Listen on an endpoint like "tcp://127.0.0.1:5555" or "tcp://[::1]:*" (a port that is free).

        Raises:
            AddressInUse: the endpoint is taken.
            WireError: it is not ours to take, or no endpoint.
        """
        self._context = zmq.Context()
        port: socket.socket | None = None
        try:
            self._port = port = _listen(endpoint)
            self.socket = self._open(endpoint)
        except OSError as error:  # zmq's errors are, too
            if port is not None:
                port.close()
            self._context.term()
            kind = AddressInUse if error.errno == errno.EADDRINUSE else WireError
            raise kind(f"cannot listen on {endpoint}: {error.strerror or error}") from None

    @property
    def endpoint(self) -> str:
        """Where it listens, with the port that was taken."""
        return self.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def reopen(self) -> None:
        """Put another socket in place of ``socket``, on the same port. All connections end, and what they had sent of
        messages that are not complete is freed.
        """
        former = self.socket
        self.socket = self._open(self.endpoint)
        former.close(0)

    def _open(self, endpoint: str) -> zmq.Socket[bytes]:
        router: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
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
            router.setsockopt(option, value)
        # Nobody answers for this domain, so whoever speaks ZMTP 3 may come in. Without it libzmq takes random bytes for
        # ZMTP 1, passes them on as messages, and aborts the process on some (assertion in zmtp_engine.cpp, 4.3.5).
        router.setsockopt(zmq.ZAP_DOMAIN, b"lmcache")
        _beat(router)
        router.setsockopt(zmq.IPV6, "[" in endpoint)
        router.setsockopt(zmq.USE_FD, self._port.dup().detach())  # zmq closes it
        try:
            router.bind(endpoint)
        except zmq.ZMQError:
            router.close(0)
            raise
        return router

    def receive(self) -> Received | None:
        """The next message, or None. Never waits."""
        try:
            parts = self.socket.recv_multipart(zmq.DONTWAIT, copy=False)
        except zmq.Again:
            return None
        frame = bytes(parts[1].buffer) if len(parts) == 2 else None
        return Received(TcpPeer(self, bytes(parts[0].buffer)), frame, str(parts[0].get("Peer-Address")))

    def send(self, identity: bytes, reply: Reply) -> bool:
        """Answer a connection without waiting; False when it is gone, or has too many answers waiting."""
        try:
            self.socket.send(identity, zmq.SNDMORE | zmq.DONTWAIT)
            self.socket.send(codec.encode(reply), zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                return False
            raise
        return True

    def close(self) -> None:
        """Stop listening; answers not yet sent are dropped."""
        self.socket.close(0)
        self._context.term()
        self._port.close()


def _listen(endpoint: str) -> socket.socket:
    """A listening socket for a tcp endpoint.

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
    # While a ROUTER is made anew two of them accept from it, and one of them finds nothing.
    port.setblocking(False)
    return port


def _beat(end: zmq.Socket[bytes]) -> None:
    """A peer that vanished without a word is noticed."""
    end.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    end.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
