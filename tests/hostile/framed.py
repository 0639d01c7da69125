"""Frames over a unix stream socket by hand: a peer that can do what no client of ours would."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
from collections.abc import Iterator

from connection import WAIT_S, Connection
from server_running import Server

from lmcache.wire import codec
from lmcache.wire import messages as m

LENGTH_BYTES = 4


def framed(*bodies: bytes) -> bytes:
    """Frames, one behind the other."""
    return b"".join(len(body).to_bytes(LENGTH_BYTES, "little") + body for body in bodies)


@contextlib.contextmanager
def stopped(server: Server) -> Iterator[None]:
    """What arrives meanwhile is all there at once when the core goes on."""
    server.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, server.process.pid, os.WSTOPPED | os.WNOWAIT)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


class Caller(Connection):
    """One connection by path."""

    def __init__(self, path: str) -> None:
        """Raises OSError: nobody listens there, or lets nobody in."""
        self._data = bytearray()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # python's own timeout would make a full queue of the listener an error at once
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(WAIT_S), 0))
        try:
            self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise
        self.socket.settimeout(WAIT_S)

    def try_send(self, data: bytes) -> None:
        """Bytes as they are, as far as the server takes them before it hangs up."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def read_frame(self) -> bytes:
        """The body of the next frame.

        Raises:
            OSError: the server hung up.
        """
        return self._take(int.from_bytes(self._take(LENGTH_BYTES), "little"))

    def _take(self, num_bytes: int) -> bytes:
        while len(self._data) < num_bytes:
            part = self.socket.recv(1 << 16)
            if not part:
                raise ConnectionResetError("the server hung up")
            self._data += part
        taken = bytes(self._data[:num_bytes])
        del self._data[:num_bytes]
        return taken

    def ask(self, request: m.Request) -> m.Reply:
        """One request by its own id, and the reply that comes next."""
        self.send(framed(codec.encode(request)))
        return self.read_reply()

    def read_reply(self) -> m.Reply:
        """The reply that comes next."""
        return codec.decode_reply(self.read_frame())
