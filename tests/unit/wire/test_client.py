"""A client and both ways to it over real sockets: deadlines are kept, nobody waits for anybody else."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from lmcache.errors import PeerRefused, PeerSilent, WireError
from lmcache.wire import codec
from lmcache.wire import messages as m
from lmcache.wire.client import LOCAL_SCHEME, Client
from lmcache.wire.local import LocalListener, LocalPeer
from lmcache.wire.peer import Received
from lmcache.wire.poller import Poller
from lmcache.wire.tcp import TcpListener, TcpPeer
from lmcache.wire.unix_listener import UnixListener

WAIT_S = 10.0
Answer = Callable[[Received], None]


def number_of(received: Received) -> int:
    assert received.frame is not None
    return codec.decode_request(received.frame).id


def pong(received: Received) -> None:
    received.peer.send(m.Pong(number_of(received), ready_bytes=7))


def babble(received: Received, data: bytes) -> None:
    """Send bytes that are no reply of ours to who asked."""
    peer = received.peer
    if isinstance(peer, TcpPeer):
        peer.listener.socket.send_multipart([peer.identity, data])
        peer.listener.socket.send_multipart([peer.identity, b"two", b"parts"])
    else:
        assert isinstance(peer, LocalPeer)
        assert peer.stream.send(data)


class Echo:
    """Both listeners on a thread that treats every message with ``answer``."""

    def __init__(self, path: Path) -> None:
        self.tcp_listener = TcpListener("tcp://127.0.0.1:*")
        self.tcp = self.tcp_listener.endpoint
        self.local = f"{LOCAL_SCHEME}{path}/rpc"
        self.answer: Answer = pong
        self.seen: list[Received] = []
        self._poller = Poller()
        self._entry = UnixListener(f"{path}/rpc", None)
        self.local_listener = LocalListener(self._entry, self._poller)
        self._stop_fd = os.eventfd(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self._poller.watch(self._stop_fd)
        self._poller.watch_socket(self.tcp_listener.socket)
        while True:
            _, fds = self._poller.wait(0.0 if self.local_listener.has_waiting else WAIT_S)
            if self._stop_fd in fds:
                return
            for fd in fds:
                assert self.local_listener.attend(fd)
            for listener in (self.local_listener, self.tcp_listener):
                received = listener.receive()
                if received is not None:
                    self.seen.append(received)
                    self.answer(received)

    def close(self) -> None:
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.close(self._stop_fd)
        self.local_listener.close()
        self._entry.close()
        self._poller.close()
        self.tcp_listener.close()


@pytest.fixture
def echo(tmp_path: Path) -> Iterator[Echo]:
    server = Echo(tmp_path)
    yield server
    server.close()


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_a_call_gets_its_answer(echo: Echo, way: str) -> None:
    with Client(getattr(echo, way)) as client:
        reply = client.call(m.Ping(0), WAIT_S)
    assert isinstance(reply, m.Pong)
    assert reply.ready_bytes == 7


def test_a_tcp_message_tells_its_address_and_a_local_one_has_none(echo: Echo) -> None:
    for endpoint in (echo.tcp, echo.local):
        with Client(endpoint) as client:
            client.call(m.Ping(0), WAIT_S)
    assert [received.address for received in echo.seen] == ["127.0.0.1", None]


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_replies_to_sent_requests_wait_for_receive_while_a_call_passes_them(echo: Echo, way: str) -> None:
    with Client(getattr(echo, way)) as client:
        client.call(m.Ping(0), WAIT_S)
        sent = [client.send(m.Ping(0)) for _ in range(3)]
        called = client.call(m.Ping(0), WAIT_S)
        received: list[m.Reply] = []
        while len(received) < 3:
            assert client.poll(WAIT_S)
            received += client.receive()
    assert [reply.id for reply in received] == sent
    assert called.id not in sent


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_a_call_nobody_answers_ends_at_its_deadline(echo: Echo, way: str) -> None:
    echo.answer = lambda *_: None
    with Client(getattr(echo, way)) as client, pytest.raises(PeerSilent, match="no answer"):
        client.call(m.Ping(0), 0.05)


def test_an_absent_server_by_tcp_is_waited_for_until_the_deadline_and_nothing_is_kept() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with Client(f"tcp://127.0.0.1:{port}") as client:
        with pytest.raises(PeerSilent, match="cannot be reached"):
            client.call(m.Ping(0), 0.05)
        with pytest.raises(PeerSilent, match="cannot be reached"):
            client.send(m.Ping(0))


def test_an_absent_server_by_path_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(PeerSilent, match=r"nobody answers at .*: No such file"):
        Client(f"{LOCAL_SCHEME}{tmp_path}/nobody")
    UnixListener(f"{tmp_path}/rpc", None)._socket.close()  # the file stays, as of a server that was killed
    with pytest.raises(PeerSilent, match=r"nobody answers at .*: Connection refused"):
        Client(f"{LOCAL_SCHEME}{tmp_path}/rpc")


def test_the_servers_end_is_told_at_once_to_who_waits_and_to_who_asks_later(echo: Echo) -> None:
    def hang_up(received: Received) -> None:
        assert isinstance(received.peer, LocalPeer)
        echo.local_listener._drop(received.peer)

    with Client(echo.local) as client:
        sent = client.send(m.Ping(0))
        assert client.poll(WAIT_S)
        echo.answer = hang_up
        with pytest.raises(PeerSilent, match="ended the conversation"):
            client.call(m.Ping(0), 3600.0)
        assert client.is_over
        assert [reply.id for reply in client.receive()] == [sent]  # what came before is not lost
        assert not client.poll(3600.0)
        with pytest.raises(PeerSilent, match="ended the conversation"):
            client.send(m.Ping(0))


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_late_foreign_and_broken_replies_are_dropped(echo: Echo, way: str) -> None:
    def answer(received: Received) -> None:
        number = number_of(received)
        received.peer.send(m.Pong(number + 1000, ready_bytes=1))
        babble(received, b"\xff\xff")
        babble(received, b"")
        received.peer.send(m.Pong(number, ready_bytes=2))
        received.peer.send(m.Pong(number, ready_bytes=3))

    echo.answer = answer
    with Client(getattr(echo, way)) as client:
        first = client.call(m.Ping(0), WAIT_S)
        second = client.call(m.Ping(0), WAIT_S)
        assert client.receive() == []
    assert [first, second] == [m.Pong(1, ready_bytes=2), m.Pong(2, ready_bytes=2)]


def test_a_reply_longer_than_any_ends_the_conversation(echo: Echo) -> None:
    echo.answer = lambda received: babble(received, b"x" * (m.FRAME_BYTES_MAX + 1))
    with Client(echo.local) as client, pytest.raises(PeerSilent, match="ended the conversation"):
        client.call(m.Ping(0), 3600.0)


def test_another_wire_version_is_said_by_name(echo: Echo) -> None:
    echo.answer = lambda received: babble(received, bytes([m.WIRE_VERSION + 1]) + codec.encode(m.Ping(1))[1:])
    with Client(echo.local) as client, pytest.raises(PeerRefused, match="speaks wire version") as caught:
        client.call(m.Ping(0), 0.2)
    assert caught.value.code == m.REFUSED_VERSION


def test_a_forgotten_request_is_not_answered_any_more(echo: Echo) -> None:
    with Client(echo.local) as client:
        client.call(m.Ping(0), WAIT_S)
        client.forget(client.send(m.Ping(0)))
        client.call(m.Ping(0), WAIT_S)
        assert client.receive() == []


def test_no_more_than_a_bounded_number_of_requests_wait(echo: Echo) -> None:
    echo.answer = lambda *_: None
    with Client(echo.local) as client:
        for _ in range(m.IN_FLIGHT_MAX):
            client.send(m.Ping(0))
        with pytest.raises(PeerSilent, match="1024 requests are unanswered"):
            client.send(m.Ping(0))
        with pytest.raises(PeerSilent, match="1024 requests are unanswered"):
            client.call(m.Ping(0), 3600.0)


def test_a_refusal_of_a_call_is_raised_with_its_code(echo: Echo) -> None:
    echo.answer = lambda received: received.peer.send(m.Refused(number_of(received), m.REFUSED_BUSY, "full")) and None
    with Client(echo.local) as client, pytest.raises(PeerRefused, match="full") as caught:
        client.call(m.Ping(0), WAIT_S)
    assert caught.value.code == m.REFUSED_BUSY


def test_a_client_that_never_reads_tcp_is_given_up_and_the_others_are_served(echo: Echo) -> None:
    outcomes: list[bool] = []
    big = m.Report(0, document=b"x" * 100_000)

    def flood(received: Received) -> None:
        if received.frame == b"deaf":
            outcomes.extend([received.peer.send(big) for _ in range(5000)])
        else:
            pong(received)

    echo.answer = flood
    context = zmq.Context()
    deaf = context.socket(zmq.DEALER)
    deaf.setsockopt(zmq.RCVHWM, 1)
    deaf.connect(echo.tcp)
    deaf.send(b"deaf")
    with Client(echo.local) as client:
        client.call(m.Ping(0), WAIT_S)
        while not outcomes:
            client.call(m.Ping(0), WAIT_S)
    deaf.close(0)
    context.term()
    assert not all(outcomes)


def test_nonsense_is_no_endpoint() -> None:
    with pytest.raises(WireError):
        Client("nonsense")
