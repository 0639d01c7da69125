"""Frames: everything of ours survives the way, everything else is refused and its id is still found."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.wire import codec
from lmcache.wire import messages as m

VERSION = bytes([m.WIRE_VERSION])
REQUESTS = [
    m.Hello(1, version=1, token=b"t" * 16),
    m.Register(2, "worker", "model", "vllm 1", 0, 2, 4096, (0,), ()),
    m.Lookup(3, keys=b"k" * 64, first_chunk=1, counted=False),
    m.Release(4, lease=9, failed=b"\0\0\0\0"),
    m.Reserve(5, keys=b"k" * 32),
    m.Commit(6, ticket=3, checksums=b"c" * 8),
    m.Abort(7, ticket=3),
    m.Ping(8),
    m.Bye(9),
    m.Snapshot(10),
    m.Clear(11),
    m.Peek(12, keys=b"k" * 64),
    m.Tenants(13),
    m.Limit(14, "tenant ü", 1.5),
    m.Limit(15, "", None),
]


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda item: f"{type(item).__name__}{item.id}")
def test_a_request_is_the_same_after_its_way(request_: m.Request) -> None:
    assert codec.decode_request(codec.encode(request_)) == request_


def test_a_reply_is_no_request() -> None:
    with pytest.raises(codec.MalformedFrame) as caught:
        codec.decode_request(codec.encode(m.Pong(7, ready_bytes=1)))
    assert caught.value.request_id == 7


def test_another_wire_version_is_refused_by_that_name_and_its_id_is_found() -> None:
    frame = bytes([m.WIRE_VERSION + 1]) + codec.encode(m.Ping(5))[1:]
    with pytest.raises(codec.MalformedFrame) as caught:
        codec.decode_request(frame)
    assert (caught.value.code, caught.value.request_id) == (m.REFUSED_VERSION, 5)


def test_a_wrong_type_is_refused_and_its_id_is_found() -> None:
    frame = bytes([m.WIRE_VERSION]) + msgspec.msgpack.encode(["lookup", 12, "not bytes", 5])
    with pytest.raises(codec.MalformedFrame) as caught:
        codec.decode_request(frame)
    assert (caught.value.code, caught.value.request_id) == (m.REFUSED_INVALID, 12)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        VERSION,
        codec.encode(m.Ping(1)) + b"x",
        VERSION + b"\x91" * 100_000,
        VERSION + b"\xdd\xff\xff\xff\xff" * 20,
        VERSION + b"\x92\xa4ping\xcc",
        VERSION + b"\x92\xa4\xff\xff\xff\xff\x05",
        VERSION + b"\0" * m.FRAME_BYTES_MAX,
    ],
    ids=["empty", "version only", "trailing", "deep", "huge arrays", "cut", "bad text", "too long"],
)
def test_a_frame_that_is_not_ours_is_refused(frame: bytes) -> None:
    with pytest.raises(codec.MalformedFrame):
        codec.decode_request(frame)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_read_but_never_anything_else(data: bytes) -> None:
    for frame in (data, bytes([m.WIRE_VERSION]) + data):
        with contextlib.suppress(codec.MalformedFrame):
            assert isinstance(codec.decode_request(frame), m.Request)
