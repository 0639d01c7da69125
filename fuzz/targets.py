"""What is fuzzed: for each decoder one function of bytes, which raises only where the decoder has a fault.

Each checks more than that nothing else is raised: what was accepted says the same after its way back, and where bytes
come in pieces, how they were cut makes no difference.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec

from lmcache.cache import records
from lmcache.errors import TierError, WireError
from lmcache.tiers import objects, redis_link
from lmcache.wire import codec, framing
from lmcache.wire import messages as m
from lmcache_cli.bench import http1, sse

PIECES_MAX = 64
_attaches: msgspec.msgpack.Decoder[m.Attach] = msgspec.msgpack.Decoder(m.Attach)
_attach_replies: msgspec.msgpack.Decoder[m.AttachReply] = msgspec.msgpack.Decoder(m.AttachReply)


def requests(data: bytes) -> None:
    """Frames that clients send to the core."""
    _frame(data, codec.decode_request)


def replies(data: bytes) -> None:
    """Frames that the core sends to clients."""
    _frame(data, codec.decode_reply)


def _frame(data: bytes, decode: Callable[[bytes], Any]) -> None:
    try:
        message = decode(data)
    except codec.MalformedFrame as error:
        malformed = error
    else:
        again = codec.encode(message)
        assert codec.encode(decode(again)) == again  # bytes, for NaN is not equal to itself
        return
    assert malformed.code in (m.REFUSED_INVALID, m.REFUSED_VERSION)
    assert malformed.request_id is None or 0 <= malformed.request_id < 1 << 64


def attach(data: bytes) -> None:
    """Frames of the attach socket, both ways, whole and as they grow."""
    for decoder in (_attaches, _attach_replies):
        whole = _unpacked(data, decoder)
        for end in range(min(len(data), 16)):
            part = _unpacked(data[:end], decoder)
            assert part is None or len(data) > end  # a message is complete only with its last byte
        if whole is not None and not isinstance(whole, WireError):
            assert _unpacked(framing.pack(whole), decoder) == whole


def _unpacked(data: bytes, decoder: msgspec.msgpack.Decoder[Any]) -> Any:
    try:
        return framing.unpack(data, decoder)
    except WireError as error:
        return error


def tier_object(data: bytes) -> None:
    """Headers of objects in tiers."""
    try:
        header = objects.decode(data)
    except objects.NoObject:
        return
    encoded = objects.encode(header)
    assert objects.decode(encoded) == header
    assert len(encoded) == objects.header_bytes(len(header.checksums))
    assert objects.padded_extent_bytes(header.num_bytes, len(header.checksums)) == objects.padded(header.extent_bytes)


def pool_records(data: bytes) -> None:
    """Images of the records file: by record and by column the same is read."""
    num_slots = len(data) // records.RECORD_BYTES
    image = data[: num_slots * records.RECORD_BYTES]
    if not num_slots:
        return
    columns = records.Columns(image, num_slots)
    whole = set(columns.slots)
    for slot in range(num_slots):
        record = records.parse(image, slot)
        assert (record is not None) <= (slot in whole)
        if record is None or slot not in whole:
            continue
        assert (record.key, record.offset, record.checksum, record.sequence) == (
            columns.keys[slot],
            columns.offset[slot],
            columns.checksum[slot],
            columns.sequence[slot],
        )
        assert (record.length, record.writer) == (columns.length[slot], columns.writer[slot])
        assert (record.world_size, record.rank, record.state) == records.part_of(columns.part[slot])
        assert record.origin == columns.origins[columns.origin[slot]]


class _Socket:
    """Gives prepared bytes in pieces, then its end."""

    def __init__(self, data: bytes, sizes: Iterator[int]) -> None:
        self._data = data
        self._sizes = sizes

    def setblocking(self, _: bool) -> None:
        """Nothing here ever blocks."""

    def recv_into(self, view: memoryview) -> int:
        """The next piece."""
        count = min(len(view), next(self._sizes), len(self._data))
        view[:count] = self._data[:count]
        self._data = self._data[count:]
        return count


def redis_reply(data: bytes) -> None:
    """Replies of a Redis server, read as any reply and as a value into memory, in whatever pieces they come."""
    if not data:
        return
    outcomes = [asyncio.run(_read_redis(data[1:], sizes)) for sizes in (_sizes(0), _sizes(data[0]))]
    assert outcomes[0] == outcomes[1]


async def _read_redis(data: bytes, sizes: Iterator[int]) -> list[object]:
    connection = SimpleNamespace(_sock=_Socket(data, sizes))
    link = redis_link.Link(connection, ("fuzz", 1))
    outcomes: list[object] = []
    parts = [memoryview(bytearray(3)), memoryview(bytearray(5))]
    try:
        for turn in range(8):
            outcomes.append(await (link.reply() if turn % 2 else link.value_into(parts)))
            outcomes.append(b"".join(parts))
    except TierError as error:
        outcomes.append(str(error))
    return outcomes


def events(data: bytes) -> None:
    """Streams of events, and what each says."""
    if not data:
        return
    whole, cut = _events(iter([data[1:]])), _events(_pieces(data[1:], data[0]))
    assert whole == cut or any(isinstance(item, str) for item in (*whole, *cut))


def _events(pieces: Iterator[bytes]) -> list[object]:
    reader = sse.Events()
    seen: list[object] = []
    try:
        for piece in pieces:
            seen += reader.feed(piece)
        seen += reader.end()
    except sse.EventFault as fault:
        return [*seen, str(fault)]
    for item in list(seen):
        try:
            seen.append(sse.read_delta(*item))  # type: ignore[misc]
        except sse.EventFault as fault:
            seen.append(fault.code)
    return seen


def response(data: bytes) -> None:
    """One streamed HTTP response."""
    if not data:
        return
    assert _response(iter([data[1:]])) == _response(_pieces(data[1:], data[0]))


def _response(pieces: Iterator[bytes]) -> tuple[object, ...]:
    reader = http1.Response()
    body = b""
    try:
        for piece in pieces:
            body += b"".join(reader.feed(piece))
            if reader.is_complete:
                break
        reader.end()
    except http1.HttpFault:
        return (reader.status,)  # where the fault is noticed depends on the pieces, and with it how much came before
    return reader.status, reader.is_complete, body


def _sizes(seed: int) -> Iterator[int]:
    """Lengths of pieces: all at once for 0."""
    while True:
        seed = (seed * 1103515245 + 12345) & 0x7FFFFFFF if seed else 0
        yield seed % PIECES_MAX + 1 if seed else 1 << 30


def _pieces(data: bytes, seed: int) -> Iterator[bytes]:
    for size in _sizes(seed):
        if not data:
            return
        yield data[:size]
        data = data[size:]


def _seeds_of_records() -> list[bytes]:
    body = records._BODY.pack(
        b"k" * 32, 65536, 7, 1, 0, 65536, records.NO_WRITER, 1, 0, records.COMMITTED, b"o" * 40, False
    )
    record = records.sealed(body)
    return [record, record * 33, bytes(len(record)) * 32, record * 31 + bytes(len(record)) + b"x" * 128]


def seeds() -> dict[str, tuple[Callable[[bytes], None], list[bytes]]]:
    """Every target by name, with inputs to start from."""
    key = b"k" * 32
    asked = [
        m.Hello(1, version=m.WIRE_VERSION, token=b"t" * 16),
        m.Register(2, "worker", "model", "vllm 1", 0, 2, 4096, (0,), (), key),
        m.Lookup(3, keys=key * 2, first_chunk=1, promote=True, promotion=9),
        m.Release(4, lease=9, failed=bytes(8)),
        m.Reserve(5, keys=key),
        m.Commit(6, ticket=3, checksums=bytes(8)),
        m.Limit(7, "tenant ü", 1.5),
        m.Admit(8, key, 2, 4096),
        m.Publish(9, 1, bytes(40), 4096, bytes(16), True),
        m.Orders(10, 1.0, 5),
    ]
    answered = [
        m.Welcome(1, b"s" * 16, m.WIRE_VERSION, "0.1", 256, "/run/x.sock"),
        m.Found(2, 1, 3, 30.0, bytes(8), bytes(8)),
        m.Granted(3, 1, b"\1\0", bytes(16), 4096),
        m.Refused(4, m.REFUSED_BUSY, "later", 5),
        m.Work(5),
    ]
    header = objects.Header(key, b"t" * 16, b"n" * 16, b"l" * 8, 65536, (1, 2))
    ask = framing.pack(m.Attach(version=1, pid=2, name="worker", want_pool=True))
    event = (
        b'event: x\ndata: {"choices":[{"delta":{"content":"hi"}}],"usage":{"prompt_tokens":1}}\r\n\r\ndata: [DONE]\n\n'
    )
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"
    return {
        "requests": (requests, list(map(codec.encode, asked))),
        "replies": (replies, list(map(codec.encode, answered))),
        "attach": (
            attach,
            [ask, framing.pack(m.AttachRefused(code="busy", message="full")), struct.pack("<I", 1 << 31)],
        ),
        "tier_object": (tier_object, [objects.encode(header), objects.encode(header)[:100]]),
        "pool_records": (pool_records, _seeds_of_records()),
        "redis_reply": (
            redis_reply,
            [
                b"\0$8\r\nabcdefgh\r\n+OK\r\n$3\r\nabc\r\n*2\r\n:1\r\n$-1\r\n-ERR no\r\n",
                b"\7" + b"*1\r\n" * 9 + b":1\r\n",
            ],
        ),
        "events": (events, [b"\0" + event, b"\5" + event * 3]),
        "response": (
            response,
            [b"\0" + head, b"\3HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", b"\1HTTP/1.0 200\r\n\r\nabc"],
        ),
    }
