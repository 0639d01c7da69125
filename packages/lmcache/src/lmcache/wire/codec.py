"""Frames: one version byte, then one msgpack array. Nothing else is ever decoded from a peer."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from lmcache.errors import WireError
from lmcache.wire.message import Message
from lmcache.wire.messages import (
    FRAME_BYTES_MAX,
    REFUSED_INVALID,
    REFUSED_VERSION,
    WIRE_VERSION,
    Reply,
    Request,
)

_ID_MAX = (1 << 64) - 1
_VERSION_BYTE = bytes([WIRE_VERSION])

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_envelopes = msgspec.msgpack.Decoder(list[msgspec.Raw])
_integers = msgspec.msgpack.Decoder(int)


class MalformedFrame(WireError):
    """A frame we do not understand; ``request_id`` is the id it carried where that much could be read, else None."""

    def __init__(self, code: str, message: str, request_id: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id


def encode(message: Message) -> bytes:
    """The frame of one message."""
    return _VERSION_BYTE + _encoder.encode(message)


def decode_request(frame: bytes) -> Request:
    """Read what a client sent.

    Raises:
        MalformedFrame: too large, another version, an unknown message, a wrong type, or anything left over.
    """
    return _decode(_requests, frame)


def decode_reply(frame: bytes) -> Reply:
    """Read what the core answered. Raises as ``decode_request``."""
    return _decode(_replies, frame)


def _decode(decoder: msgspec.msgpack.Decoder[T], frame: bytes) -> T:
    if not 1 < len(frame) <= FRAME_BYTES_MAX:
        raise MalformedFrame(REFUSED_INVALID, f"a frame has 2 to {FRAME_BYTES_MAX} bytes, this one {len(frame)}")
    body = memoryview(frame)[1:]
    if frame[0] != WIRE_VERSION:
        message = f"this side speaks wire version {WIRE_VERSION}, the frame says {frame[0]}"
        raise MalformedFrame(REFUSED_VERSION, message, _salvage_id(body))
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise MalformedFrame(REFUSED_INVALID, f"not a message we know: {error}", _salvage_id(body)) from None


def _salvage_id(body: memoryview) -> int | None:
    """The id of ``[tag, id, ...]``, whatever the rest of it is: its sender can then still be answered."""
    try:
        envelope = _envelopes.decode(body)
        request_id = _integers.decode(envelope[1])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, IndexError):
        return None
    return request_id if 0 <= request_id <= _ID_MAX else None
