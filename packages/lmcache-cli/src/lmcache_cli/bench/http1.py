"""One HTTP/1.1 request as bytes, and one response out of bytes; knows no sockets and no clock.

Only what a streamed answer needs: no redirects, no compression, no trailers, no second response.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

HEAD_BYTES_MAX = 64 << 10
CHUNK_LINE_BYTES_MAX = 4 << 10
INTERIM_HEADS_MAX = 8

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-9][0-9][0-9])(?: .*)?")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;.*)?")


class HttpFault(Exception):
    """The response cannot be read; the text says what is wrong with it."""


class NotHttp(HttpFault):
    """What arrived is no HTTP response at all."""


def post(url: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """A POST of JSON that asks for a stream of events, on a connection that carries nothing after it."""
    parts = urlsplit(url)
    fields = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Accept": "text/event-stream",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    given = {name.lower() for name in headers}
    fields = {**{name: value for name, value in fields.items() if name.lower() not in given}, **headers}
    lines = [f"POST {parts.path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode("ascii") + body


class Response:
    """Reads one response, however its bytes are cut into pieces.

    Attributes:
        status: None until the head is there.
        is_complete: whether the body came to the end that the head announced.
    """

    def __init__(self) -> None:
        self.status: int | None = None
        self.is_complete = False
        self._read = self._read_head
        self._rest = b""
        self._left_bytes = 0  # of the body, or of the chunk
        self._num_interim = 0
        self._body: list[bytes] = []

    def feed(self, data: bytes) -> list[bytes]:
        """Take what arrived; returns the parts of the body in it, at once and not when a chunk is whole.

        Raises:
            HttpFault: it cannot be read.
        """
        self._body = []
        self._rest = self._rest + data if self._rest else data
        while self._rest and not self.is_complete and self._read():
            pass
        return self._body

    def end(self) -> None:
        """The connection was ended in good order; where the head announced no length that is the body's end."""
        if self.status is not None and self._read == self._read_until_close:
            self.is_complete = True

    # Each reader takes what it can from ``_rest`` and says whether the next one has anything to do.

    def _read_head(self) -> bool:
        if not b"HTTP/1.".startswith(self._rest[:7]):
            raise NotHttp("it does not begin as HTTP/1.1 does")
        head, blank, rest = self._rest.partition(b"\r\n\r\n")
        if len(head) > HEAD_BYTES_MAX:
            raise HttpFault(f"its head is longer than {HEAD_BYTES_MAX >> 10} KiB")
        if not blank:
            return False
        self._rest = rest
        first, *lines = head.split(b"\r\n")
        match = _STATUS_LINE.fullmatch(first)
        if match is None:
            raise HttpFault("its first line is not a status line")
        status = int(match[1])
        fields: dict[bytes, bytes] = {}
        for line in lines:
            name, _, value = line.partition(b":")
            fields[name.lower()] = value.strip()
        if status < 200:
            self._num_interim += 1
            if status == 101 or self._num_interim > INTERIM_HEADS_MAX:
                raise HttpFault("it never comes to its final status")
            return True
        self.status = status
        self._begin_body(fields)
        return True

    def _begin_body(self, fields: Mapping[bytes, bytes]) -> None:
        if fields.get(b"content-encoding", b"identity").lower() not in (b"", b"identity"):
            raise HttpFault("it is compressed, although that was not asked for")
        coding = fields.get(b"transfer-encoding", b"").lower()
        length = fields.get(b"content-length")
        if self.status in (204, 304):
            self.is_complete = True
        elif coding:
            if coding != b"chunked":
                raise HttpFault("its transfer coding is not `chunked`")
            self._read = self._read_chunk_line
        elif length is not None:
            if not length.isdigit() or len(length) > 15:
                raise HttpFault("its length is not a number")
            self._left_bytes = int(length)
            self._read = self._read_length
            self.is_complete = self._left_bytes == 0
        else:
            self._read = self._read_until_close

    def _read_length(self) -> bool:
        self._take()
        self.is_complete = self._left_bytes == 0
        return False

    def _read_until_close(self) -> bool:
        self._body.append(self._rest)
        self._rest = b""
        return False

    def _read_chunk_line(self) -> bool:
        line = self._line()
        if line is None:
            return False
        match = _CHUNK_LINE.fullmatch(line)
        if match is None:
            raise HttpFault("the size of a chunk is not a number")
        self._left_bytes = int(match[1], 16)
        self._read = self._read_chunk if self._left_bytes else self._read_trailer
        return True

    def _read_chunk(self) -> bool:
        self._take()
        if self._left_bytes == 0:
            self._read = self._read_chunk_end
        return True

    def _read_chunk_end(self) -> bool:
        if len(self._rest) < 2:
            return False
        if self._rest[:2] != b"\r\n":
            raise HttpFault("a chunk is longer than its size says")
        self._rest = self._rest[2:]
        self._read = self._read_chunk_line
        return True

    def _read_trailer(self) -> bool:
        line = self._line()
        self.is_complete = line == b""
        return line is not None

    def _take(self) -> None:
        part = self._rest[: self._left_bytes]
        self._rest = self._rest[len(part) :]
        self._left_bytes -= len(part)
        self._body.append(part)

    def _line(self) -> bytes | None:
        line, end, rest = self._rest.partition(b"\r\n")
        if len(line) > CHUNK_LINE_BYTES_MAX:
            raise HttpFault("a line between its chunks is too long")
        if not end:
            return None
        self._rest = rest
        return line
