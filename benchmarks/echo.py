"""The yardsticks of a round trip: a bare pyzmq echo, and a raw unix socket's, each with its other end in a process of
its own. Nothing is decoded, looked up or decided at either end.

A request begins with the length of its reply (4 bytes, little-endian); the reply is that many of its first bytes.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import common
import zmq

LENGTH_BYTES = 4
_CONNECT_S = 30.0


def alternate(ends: Mapping[str, Callable[[], float]], rounds: int, block: int) -> dict[str, list[float]]:
    """What each end returns, ``block`` calls of one after ``block`` of the other, ``rounds`` times; another one begins
    each round. One round before these is thrown away.
    """
    names = list(ends)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-1, rounds):
        for turn in range(len(names)):
            name = names[(index + turn) % len(names)]
            values = [ends[name]() for _ in range(block)]
            if index >= 0:
                taken[name] += values
    return taken


def frame_of(request_bytes: int, reply_bytes: int) -> bytes:
    """A request whose echo has ``reply_bytes``; longer than asked for where it could not be echoed otherwise."""
    return reply_bytes.to_bytes(LENGTH_BYTES, "little").ljust(max(request_bytes, reply_bytes, LENGTH_BYTES), b"\0")


class _Echo:
    """The other end's process."""

    def __init__(self, kind: str, path: Path) -> None:
        self._process = subprocess.Popen([sys.executable, __file__, kind, str(path)])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        common.stop(self._process)


class ZmqEcho(_Echo):
    """A DEALER that asks a ROUTER over ipc: two calls of pyzmq at this end, four at the other."""

    def __init__(self, folder: Path) -> None:
        super().__init__("zmq", folder / "echo.zmq")
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.connect(f"ipc://{folder}/echo.zmq")

    def seconds(self, frame: bytes) -> float:
        """One round trip of a ``frame_of``."""
        start = time.perf_counter()
        self._dealer.send(frame)
        self._dealer.recv()
        return time.perf_counter() - start

    def close(self) -> None:
        """End both ends."""
        self._dealer.close(0)
        self._context.term()
        super().close()


class SocketEcho(_Echo):
    """A unix stream socket, blocking, one send and one receive at each end: frames of up to a few kilobytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__("socket", folder / "echo.unix")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        deadline = time.monotonic() + _CONNECT_S
        while True:
            try:
                self._socket.connect(f"{folder}/echo.unix")
                return
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.01)

    def seconds(self, frame: bytes) -> float:
        """One round trip of a ``frame_of``."""
        start = time.perf_counter()
        self._socket.send(frame)
        self._socket.recv(1 << 16)
        return time.perf_counter() - start

    def close(self) -> None:
        """End both ends."""
        self._socket.close()
        super().close()


def _serve_zmq(path: str) -> None:
    router: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    router.bind(f"ipc://{path}")
    receive, send = router.recv, router.send
    while True:
        identity, frame = receive(), receive()
        send(identity, zmq.SNDMORE)
        send(frame[: int.from_bytes(frame[:LENGTH_BYTES], "little")])


def _serve_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as door:
        door.bind(path)
        door.listen()
        peer, _ = door.accept()
        with peer:
            while frame := peer.recv(1 << 16):
                peer.send(frame[: int.from_bytes(frame[:LENGTH_BYTES], "little")])


if __name__ == "__main__":
    {"zmq": _serve_zmq, "socket": _serve_socket}[sys.argv[1]](sys.argv[2])
