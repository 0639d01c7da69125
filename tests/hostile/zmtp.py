"""ZMTP 3 by hand: a peer that can do what no library would."""

from __future__ import annotations

import socket
import struct

from connection import WAIT_S, Connection

GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x01NULL" + b"\0" * 48
"""Signature, version 3.1, mechanism NULL, not as server: 64 bytes."""

MORE, LONG, COMMAND = 1, 2, 4


def frame(body: bytes, flags: int = 0) -> bytes:
    """One frame with a length of 8 bytes."""
    return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body


def ready(kind: bytes = b"DEALER", identity: bytes = b"") -> bytes:
    """The command that ends the handshake."""
    metadata = b"".join(
        bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
        for name, value in ((b"Socket-Type", kind), (b"Identity", identity))
    )
    return frame(b"\x05READY" + metadata, COMMAND)


class Stranger(Connection):
    """One by tcp, after its handshake."""

    def __init__(self, port: int, kind: bytes = b"DEALER", identity: bytes = b"") -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WAIT_S)
        try:
            self.socket.sendall(GREETING + ready(kind, identity))
            self.read_exactly(len(GREETING))
            self.read_frame()
        except OSError:
            self.socket.close()
            raise

    def read_exactly(self, num_bytes: int) -> bytes:
        """So many bytes.

        Raises:
            OSError: the server hung up.
        """
        data = b""
        while len(data) < num_bytes:
            part = self.socket.recv(num_bytes - len(data))
            if not part:
                raise ConnectionResetError("the server hung up")
            data += part
        return data

    def read_frame(self) -> bytes:
        """The body of the next frame, commands among them."""
        flags = self.read_exactly(1)[0]
        length = struct.unpack(">Q", self.read_exactly(8))[0] if flags & LONG else self.read_exactly(1)[0]
        return self.read_exactly(length)

    def read_message(self) -> bytes:
        """The next message of one part; heartbeats of the server are passed over."""
        while True:
            flags = self.read_exactly(1)[0]
            length = struct.unpack(">Q", self.read_exactly(8))[0] if flags & LONG else self.read_exactly(1)[0]
            body = self.read_exactly(length)
            if not flags & COMMAND:
                return body
