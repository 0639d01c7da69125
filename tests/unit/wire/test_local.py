"""The core's end of conversations by path, one verb at a time: turns, limits, and who stops reading."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache.wire import codec, local
from lmcache.wire import messages as m
from lmcache.wire.local import LocalListener, LocalPeer
from lmcache.wire.peer import Received
from lmcache.wire.poller import Poller
from lmcache.wire.unix_listener import UnixListener

BIG = m.Report(0, document=b"x" * 100_000)


class World:
    """A listener that is turned by hand."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.poller = Poller()
        self.entry = UnixListener(path, None)
        self.listener = LocalListener(self.entry, self.poller)
        self._clients: list[socket.socket] = []

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.connect(self.path)
        self._clients.append(client)
        self.turn()
        return client

    def turn(self) -> None:
        """Attend what is ready now."""
        for fd in self.poller.wait(0.0)[1]:
            assert self.listener.attend(fd)

    def taken(self) -> list[Received]:
        """All messages, in the order in which they are given out."""
        messages = []
        while (received := self.listener.receive()) is not None:
            messages.append(received)
        return messages

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.listener.close()
        self.entry.close()
        self.poller.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(f"{tmp_path}/rpc")
    yield made
    made.close()


def framed(*frames: bytes) -> bytes:
    return b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames)


def test_connections_are_heard_in_turn_one_message_each(world: World) -> None:
    flood, shy = world.connect(), world.connect()
    flood.sendall(framed(*[b"f%d" % number for number in range(5)]))
    shy.sendall(framed(b"s0", b"s1"))
    world.turn()
    assert world.listener.has_waiting
    frames = [received.frame for received in world.taken()]
    assert set(frames[:2]) == {b"f0", b"s0"}
    assert set(frames[2:4]) == {b"f1", b"s1"}
    assert frames[4:] == [b"f2", b"f3", b"f4"]
    assert not world.listener.has_waiting


def test_nothing_more_is_read_of_who_has_messages_waiting(world: World) -> None:
    client = world.connect()
    client.sendall(framed(b"one"))
    world.turn()
    client.sendall(framed(b"two"))
    world.turn()
    assert [received.frame for received in world.taken()] == [b"one"]
    world.turn()
    assert [received.frame for received in world.taken()] == [b"two"]


def test_who_does_not_read_is_not_heard_until_it_does_and_loses_nothing(world: World) -> None:
    deaf, other = world.connect(), world.connect()
    deaf.setblocking(False)
    deaf.sendall(framed(*[b"q%d" % number for number in range(20)]))
    world.turn()
    num_answered = 0
    while (received := world.listener.receive()) is not None:
        assert received.peer.send(BIG)
        num_answered += 1
    assert num_answered < 20
    other.sendall(framed(b"hello"))
    world.turn()
    assert [received.frame for received in world.taken()] == [b"hello"]
    assert not world.listener.has_waiting
    assert world.poller.wait(0.05) == ([], [])  # and it costs nothing meanwhile
    answer = framed(codec.encode(BIG))
    data = bytearray()
    while len(data) < 20 * len(answer):
        try:
            data += deaf.recv(1 << 20)
        except BlockingIOError:
            world.turn()
            for received in world.taken():
                assert received.peer.send(BIG)
    assert data == answer * 20
    assert world.listener._held_bytes == 0


def test_an_answer_that_takes_with_it_what_waited_lets_its_reader_be_heard_again(world: World) -> None:
    client = world.connect()
    client.sendall(framed(b"one", b"two"))
    world.turn()
    one = world.listener.receive()
    assert one is not None
    num_sent = 0
    while not world.listener._peers[one.peer.fd].stream.has_unsent:  # type: ignore[attr-defined]
        assert one.peer.send(BIG)
        num_sent += 1
    assert world.listener.receive() is None  # its answers are unread
    left, answer = num_sent * len(framed(codec.encode(BIG))), m.Pong(1, ready_bytes=1)
    while left > 200_000:
        left -= len(client.recv(1 << 20))
    assert one.peer.send(answer)
    two = world.listener.receive()
    assert two is not None
    assert two.frame == b"two"
    left += len(framed(codec.encode(answer)))
    while left:
        left -= len(client.recv(1 << 20))
    assert world.poller.wait(0.05) == ([], [])  # and nothing turns in circles


def test_who_leaves_while_answers_wait_is_forgotten(world: World) -> None:
    client = world.connect()
    client.sendall(framed(*[b"q"] * 20))
    world.turn()
    while (received := world.listener.receive()) is not None:
        received.peer.send(BIG)
    client.close()
    world.turn()
    waiting = world.taken()
    assert waiting
    for received in waiting:
        assert received.peer.send(BIG)  # nobody misses it
    world.turn()
    assert world.taken() == []
    assert len(world.listener) == 0
    assert world.listener._held_bytes == 0
    assert world.poller.wait(0.05) == ([], [])


def test_too_many_answers_that_nobody_asked_for_end_the_connection(world: World) -> None:
    client = world.connect()
    client.sendall(framed(b"q"))
    world.turn()
    (received,) = world.taken()
    num_sent = 0
    while received.peer.send(BIG):
        num_sent += 1
    assert num_sent > 80
    assert len(world.listener) == 0
    assert not received.peer.send(BIG)
    assert world.listener._held_bytes == 0


def test_the_last_words_of_a_process_are_heard(world: World) -> None:
    client = world.connect()
    client.sendall(framed(b"one", b"two") + b"\x05")
    client.close()
    world.turn()
    assert [received.frame for received in world.taken()] == [b"one", b"two"]
    world.turn()
    assert world.taken() == []
    assert len(world.listener) == 0


def test_a_giant_is_a_message_without_a_frame_after_those_before_it_and_the_end(world: World) -> None:
    client = world.connect()
    client.sendall(framed(b"one") + (m.FRAME_BYTES_MAX + 1).to_bytes(4, "little"))
    world.turn()
    assert [received.frame for received in world.taken()] == [b"one", None]
    assert len(world.listener) == 0
    assert client.recv(1) == b""


def test_who_leaves_most_loses_its_connection_when_there_is_no_room_for_all(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "HELD_BYTES_MAX", 100_000)
    good = world.connect()
    halves = [world.connect() for _ in range(6)]
    for number, half in enumerate(halves):
        half.sendall((1 << 20).to_bytes(4, "little") + b"x" * (20_000 + number))
        world.turn()
    assert len(world.listener) == 5  # 4 halves, and the good one
    assert [half.recv(1) for half in halves[4:]] == [b"", b""]
    assert world.listener.held_bytes == 4 * 20_004 + 0 + 1 + 2 + 3
    good.sendall((30_000).to_bytes(4, "little") + b"x" * 19_990)
    world.turn()  # it is the last to come, and not the one that leaves most
    assert halves[3].recv(1) == b""
    good.sendall(b"x" * 10_010)
    world.turn()
    assert [received.frame for received in world.taken()] == [b"x" * 30_000]
    halves[0].close()
    world.turn()
    world.taken()
    assert world.listener.held_bytes == 2 * 20_004 + 1 + 2


def test_connections_beyond_the_limit_are_turned_away(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CONNECTIONS_MAX", 2)
    first, _ = world.connect(), world.connect()
    third = world.connect()
    assert third.recv(1) == b""
    first.sendall(framed(b"hello"))
    world.turn()
    assert [received.frame for received in world.taken()] == [b"hello"]


def test_a_descriptor_of_somebody_else_is_not_attended(world: World) -> None:
    with socket.socket() as other:
        assert not world.listener.attend(other.fileno())


def test_two_connections_are_two_peers(world: World) -> None:
    for client in (world.connect(), world.connect()):
        client.sendall(framed(b"hello"))
    world.turn()
    one, two = (received.peer for received in world.taken())
    assert isinstance(one, LocalPeer)
    assert one != two
    assert len({one, two}) == 2
