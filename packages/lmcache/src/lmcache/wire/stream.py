"""Frames over one connected unix stream socket: 4 bytes of length (little-endian), then the frame."""

from __future__ import annotations

import math
import select
import socket
import time
from collections import deque

from lmcache.wire.framing import LENGTH_BYTES
from lmcache.wire.messages import FRAME_BYTES_MAX

PIECE_BYTES = 64 << 10
"""What one read takes at most: a connection's whole frames that nobody has taken yet fit in this and one frame. From
128 KiB on, a buffer of its own for each read would cost 15 us and more."""

CUT_MAX = 16
"""Frames that are cut out of a piece ahead of their turn: as objects, tiny ones take twenty times their bytes."""

UNSENT_BYTES_MAX = 8 << 20
"""What may wait to be sent: far more than an end that reads lets it come to."""


class Stream:
    """One end. Nothing here waits, except ``receive`` with a time.

    The other end has closed, or broke the rules, when ``is_at_end``: nothing more comes, ``frames`` may still hold what
    came before, and ``fault`` says which rule. Nobody hears what is sent when ``is_gone``.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.frames: deque[bytes] = deque()
        self.is_at_end = False
        self.is_gone = False
        self.fault: str | None = None
        self._socket = connection
        self._unsent = bytearray()
        self._part = bytearray()  # the beginning of a frame
        self._poll = select.poll()
        self._poll.register(connection, select.POLLIN)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    @property
    def is_over(self) -> bool:
        """Whether no question can be asked and answered any more."""
        return self.is_at_end or self.is_gone

    @property
    def has_unsent(self) -> bool:
        """Whether something waits for the other end to read: call ``flush`` when the socket can be written to."""
        return bool(self._unsent)

    @property
    def held_bytes(self) -> int:
        """Bytes that wait here: to be read by the other end, or to be cut into frames."""
        return len(self._unsent) + len(self._part)

    def send(self, frame: bytes) -> bool:
        """Send, or keep for ``flush``. False: not sent, the other end is gone or does not read."""
        if self.is_gone:
            return False
        data = len(frame).to_bytes(LENGTH_BYTES, "little") + frame
        if self._unsent:
            if len(self._unsent) + len(data) > UNSENT_BYTES_MAX:
                return False
            self._unsent += data
            self.flush()
            return not self.is_gone
        num_sent = self._send(data)
        if num_sent < len(data) and not self.is_gone:
            self._unsent += memoryview(data)[num_sent:]
        return not self.is_gone

    def flush(self) -> bool:
        """Send what waits, as far as it goes now; whether nothing waits any more."""
        if self._unsent:
            num_sent = self._send(self._unsent)
            del self._unsent[:num_sent]
        return not self._unsent

    def _send(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError:
            self.is_gone = True
            self._unsent.clear()
            return 0

    def read(self) -> bool:
        """Move a piece of what has arrived into ``frames``, as far as they are whole; False: there was nothing."""
        try:
            data = self._socket.recv(PIECE_BYTES)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self.is_at_end = True
            return False
        if not self._part and len(data) == LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little"):
            self.frames.append(data[LENGTH_BYTES:])  # the usual case: one frame, whole
        else:
            self._part += data
            self._cut()
        return True

    def _cut(self) -> None:
        part, start = self._part, 0
        while len(part) - start >= LENGTH_BYTES and len(self.frames) < CUT_MAX:
            length = int.from_bytes(part[start : start + LENGTH_BYTES], "little")
            if length > FRAME_BYTES_MAX:
                self.fault = f"a frame has at most {FRAME_BYTES_MAX} bytes, this one claims {length}"
                self.is_at_end = True
                part.clear()
                return
            end = start + LENGTH_BYTES + length
            if end > len(part):
                break
            self.frames.append(bytes(part[start + LENGTH_BYTES : end]))
            start = end
        del part[:start]

    def take(self) -> bytes:
        """The first of ``frames``, which are not empty; then they are only if nothing whole has been read beyond it."""
        frame = self.frames.popleft()
        if self._part and not self.frames:
            self._cut()
        return frame

    def receive(self, timeout_s: float = 0.0) -> bytes | None:
        """The next frame, waiting at most ``timeout_s`` seconds for it; None when there is none, or ``is_at_end``."""
        if self._unsent:
            self.flush()  # also for who never waits
        deadline, left_s = time.monotonic() + timeout_s, timeout_s
        while not (self.frames or self.is_at_end):
            if left_s > 0:
                self._wait(left_s)
            if not self.read() and left_s <= 0:
                break
            left_s = deadline - time.monotonic()
        return self.take() if self.frames else None

    def _wait(self, timeout_s: float) -> None:
        if self._unsent:
            self._poll.modify(self._socket, select.POLLIN | select.POLLOUT)
            self._poll.poll(math.ceil(timeout_s * 1000))
            self._poll.modify(self._socket, select.POLLIN)
            self.flush()
        else:
            self._poll.poll(math.ceil(timeout_s * 1000))

    def close(self) -> None:
        """End it; what waits is dropped. May be called twice."""
        self.is_at_end = self.is_gone = True
        self.frames.clear()
        self._part.clear()
        self._unsent.clear()
        self._socket.close()
