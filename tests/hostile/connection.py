"""What is the same for whoever speaks to a server by hand, by path or by tcp."""

from __future__ import annotations

import socket
from typing import Self

WAIT_S = 30.0


class Connection:
    """One connection; bytes go out as they are given. Every wait ends after ``WAIT_S`` with a TimeoutError."""

    socket: socket.socket

    def send(self, data: bytes) -> None:
        """Bytes as they are.

        Raises:
            OSError: the server hung up.
        """
        self.socket.sendall(data)

    def is_hung_up(self) -> bool:
        """Whether the server has ended the connection, or does so within a generous time; what it said is dropped."""
        try:
            while self.socket.recv(1 << 16):
                pass
        except TimeoutError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Leave without a word."""
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
