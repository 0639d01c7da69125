"""Frames of the attach conversation: 4-byte little-endian length, then msgpack; one frame each way."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from lmcache.errors import WireError

ATTACH_BYTES_MAX = 4096
LENGTH_BYTES = 4

T = TypeVar("T")

_encoder = msgspec.msgpack.Encoder()


def pack(message: msgspec.Struct) -> bytes:
    """One frame."""
    body = _encoder.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "little") + body


def unpack(data: bytes | bytearray, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
    """The message in ``data`` once it is complete; None while bytes are missing.

    Raises:
        WireError: too long, not a message of that kind, or more than one.
    """
    if len(data) < LENGTH_BYTES:
        return None
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if length > ATTACH_BYTES_MAX:
        raise WireError(f"an attach frame has at most {ATTACH_BYTES_MAX} bytes, this one claims {length}")
    body = bytes(data[LENGTH_BYTES:])
    if len(body) < length:
        return None
    if len(body) > length:
        raise WireError("more than one attach frame")
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not an attach message: {error}") from None
