"""One end of a stream of frames: whatever the pieces are that the bytes arrive in, and whoever stops reading."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.wire.messages import FRAME_BYTES_MAX
from lmcache.wire.stream import UNSENT_BYTES_MAX, Stream

WAIT_S = 10.0


def framed(frame: bytes) -> bytes:
    return len(frame).to_bytes(4, "little") + frame


@pytest.fixture
def pair() -> Iterator[tuple[Stream, socket.socket]]:
    ours, theirs = socket.socketpair()
    stream = Stream(ours)
    yield stream, theirs
    stream.close()
    theirs.close()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=20), st.lists(st.integers(1, 300), min_size=1))
def test_frames_come_out_as_they_went_in_whatever_the_pieces(frames: list[bytes], sizes: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        stream = Stream(ours)
        data, got, turn = b"".join(map(framed, frames)), [], 0
        while data:
            size = sizes[turn % len(sizes)]
            theirs.sendall(data[:size])
            data, turn = data[size:], turn + 1
            assert stream.read()
            while (frame := stream.receive()) is not None:
                got.append(frame)
        assert got == frames
        assert stream.held_bytes == 0
        assert not stream.read()
        assert not stream.is_over
        stream.close()


def test_the_largest_frame_passes_both_ways_and_one_byte_more_ends_it(pair: tuple[Stream, socket.socket]) -> None:
    stream, theirs = pair
    other = Stream(theirs.dup())
    largest = bytes(range(256)) * (FRAME_BYTES_MAX // 256)
    assert other.send(largest)
    frame = None
    while frame is None:
        other.flush()
        frame = stream.receive()
    assert frame == largest
    other.close()
    theirs.sendall(framed(b"before") + (FRAME_BYTES_MAX + 1).to_bytes(4, "little") + b"x" * 100)
    assert stream.receive(WAIT_S) == b"before"
    assert stream.is_over
    assert stream.fault == f"a frame has at most {FRAME_BYTES_MAX} bytes, this one claims {FRAME_BYTES_MAX + 1}"
    assert stream.receive(3600.0) is None
    assert stream.send(b"more")  # what it asked before is still answered


def test_what_the_other_end_does_not_read_waits_here_up_to_a_limit_and_arrives_whole(
    pair: tuple[Stream, socket.socket],
) -> None:
    stream, theirs = pair
    other, sent = Stream(theirs.dup()), 0
    while stream.send(sent.to_bytes(4, "little") * 25_000):
        sent += 1
    assert not stream.is_over
    assert 0 < UNSENT_BYTES_MAX - stream.held_bytes < 100_004
    for number in range(sent):
        while (frame := other.receive()) is None:
            stream.flush()
        assert frame == number.to_bytes(4, "little") * 25_000
    assert stream.flush()
    assert not stream.has_unsent
    other.close()


def test_waiting_for_an_answer_sends_what_waits(pair: tuple[Stream, socket.socket]) -> None:
    """A request that the socket had no room for goes out while its answer is waited for."""
    stream, theirs = pair
    stream.send(b"x" * FRAME_BYTES_MAX)
    assert stream.has_unsent
    theirs.sendall(framed(b"early"))
    read = 0
    while stream.has_unsent:
        read += len(theirs.recv(1 << 20))
        stream._wait(WAIT_S)
    while read < FRAME_BYTES_MAX + 4:
        read += len(theirs.recv(1 << 20))
    assert stream.receive(WAIT_S) == b"early"


def test_who_only_sends_and_looks_gets_a_long_request_through(pair: tuple[Stream, socket.socket]) -> None:
    """A scheduler never waits: what its socket had no room for goes out when it looks for answers."""
    stream, theirs = pair
    other = Stream(theirs.dup())
    assert stream.send(b"x" * 262_144)
    assert stream.has_unsent
    for _ in range(100):
        assert stream.receive() is None
        while other.read():
            pass
    assert other.receive() == b"x" * 262_144
    other.close()


def test_the_end_comes_after_all_that_was_said(pair: tuple[Stream, socket.socket]) -> None:
    stream, theirs = pair
    theirs.sendall(framed(b"one") + framed(b"two") + framed(b"never whole")[:7])
    theirs.close()
    assert [stream.receive(WAIT_S), stream.receive(WAIT_S), stream.receive(3600.0)] == [b"one", b"two", None]
    assert stream.is_over
    assert stream.fault is None


def test_sending_to_who_has_left_is_told(pair: tuple[Stream, socket.socket]) -> None:
    stream, theirs = pair
    theirs.close()
    assert not stream.send(b"anybody?")
    assert stream.is_over
    assert not stream.has_unsent


def test_who_leaves_while_something_waits_to_be_sent_is_noticed_by_the_flush(
    pair: tuple[Stream, socket.socket],
) -> None:
    stream, theirs = pair
    while not stream.has_unsent:
        assert stream.send(b"x" * 100_000)
    theirs.close()
    assert stream.flush()  # nothing is left to wait for
    assert stream.is_over


def test_a_receive_ends_at_its_time(pair: tuple[Stream, socket.socket]) -> None:
    stream, theirs = pair
    theirs.sendall(framed(b"never whole")[:7])
    assert stream.receive(0.05) is None
    assert not stream.is_over
    assert stream.held_bytes == 7
