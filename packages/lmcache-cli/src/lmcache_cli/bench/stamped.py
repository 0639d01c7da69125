"""A socket that knows when what it has read arrived: on Linux the kernel notes it, however late this process looks.

An engine that writes to many streams at one moment, or a machine with few cores, keeps this process from running while
pieces arrive; a time taken when they are read would count that waiting to the engine.
"""

from __future__ import annotations

import socket
import struct
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AGE_S_MAX = 10.0
"""What is older was not read late: the system's clock was set meanwhile."""

_SO_TIMESTAMPNS = 35  # Linux's; Python has no name for it
_TIME = struct.Struct("@ll")  # struct timespec
_SPACE = 64  # of the control message


class StampedSocket(socket.socket):
    """A stream socket for asyncio's BufferedProtocol, which reads with ``recv_into``.

    Read with anything else (Windows' event loop, TLS on Python 3.10), on another system, or where the kernel does not
    say, ``age_s`` is 0, and a time of arrival is the time of reading.
    """

    _stamp_ns = 0

    def ask_for_stamps(self) -> None:
        """Let the kernel note arrivals, where it can."""
        if sys.platform == "linux":
            try:
                self.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            except OSError:
                return

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """As ``socket.socket``'s; remembers when the last byte of what it read arrived."""
        if sys.platform != "linux":
            return super().recv_into(buffer, nbytes, flags)
        self._stamp_ns = 0
        view = memoryview(buffer)
        num_bytes, messages, _, _ = self.recvmsg_into([view[:nbytes] if nbytes else view], _SPACE, flags)
        for level, kind, data in messages:
            if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS and len(data) >= _TIME.size:
                seconds, nanoseconds = _TIME.unpack_from(data)
                self._stamp_ns = seconds * 1_000_000_000 + nanoseconds
        return num_bytes

    def age_s(self) -> float:
        """How many seconds ago the last byte that was read arrived; 0 where that is not known."""
        if not self._stamp_ns:
            return 0.0
        age_s = (time.time_ns() - self._stamp_ns) / 1e9
        return age_s if 0 <= age_s <= AGE_S_MAX else 0.0
