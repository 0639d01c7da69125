"""Client and listener over real sockets: deadlines are kept, nobody waits for anybody else."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from lmcache.errors import PeerRefused, PeerSilent, WireError
from lmcache.wire import codec
from lmcache.wire import messages as m
from lmcache.wire.peer import AddressInUse, Client, Listener, Received
from lmcache.wire.poller import Poller

WAIT_S = 10.0
Answer = Callable[[Listener, Received], None]


def pong(listener: Listener, received: Received) -> None:
    assert received.frame is not None
    listener.send(received.peer, m.Pong(codec.decode_request(received.frame).id, ready_bytes=7))


class Echo:
    """A listener on a thread that treats every message with ``answer``."""

    def __init__(self, path: Path) -> None:
        self.listener = Listener()
        self.local = self.listener.bind(f"ipc://{path}/rpc")
        self.tcp = self.listener.bind("tcp://127.0.0.1:*")
        self.answer: Answer = pong
        self.seen: list[Received] = []
        self._stop_fd = os.eventfd(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        poller = Poller()
        poller.watch(self._stop_fd)
        for door in self.listener.doors:
            poller.watch_socket(door)
        while True:
            doors, fds = poller.wait(WAIT_S)
            if fds:
                poller.close()
                return
            for door in doors:
                received = self.listener.receive(self.listener.doors.index(door))
                if received is not None:
                    self.seen.append(received)
                    self.answer(self.listener, received)

    def close(self) -> None:
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join()
        os.close(self._stop_fd)
        self.listener.close()


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


def test_replies_to_sent_requests_wait_for_receive_while_a_call_passes_them(echo: Echo) -> None:
    with Client(echo.local) as client:
        client.call(m.Ping(0), WAIT_S)
        sent = [client.send(m.Ping(0)) for _ in range(3)]
        called = client.call(m.Ping(0), WAIT_S)
        received: list[m.Reply] = []
        while len(received) < 3:
            assert client.poll(WAIT_S)
            received += client.receive()
    assert [reply.id for reply in received] == sent
    assert called.id not in sent


def test_a_call_nobody_answers_ends_at_its_deadline(echo: Echo) -> None:
    echo.answer = lambda *_: None
    with Client(echo.local) as client, pytest.raises(PeerSilent, match="no answer"):
        client.call(m.Ping(0), 0.05)


def test_a_call_to_an_absent_server_ends_at_its_deadline(tmp_path: Path) -> None:
    with Client(f"ipc://{tmp_path}/nobody") as client, pytest.raises(PeerSilent, match="cannot be reached"):
        client.call(m.Ping(0), 0.05)


def test_a_send_to_an_absent_server_fails_at_once_and_is_not_kept(tmp_path: Path) -> None:
    with Client(f"ipc://{tmp_path}/nobody") as client, pytest.raises(PeerSilent):
        client.send(m.Ping(0))


def test_late_foreign_and_broken_replies_are_dropped(echo: Echo) -> None:
    def answer(listener: Listener, received: Received) -> None:
        assert received.frame is not None
        request_id = codec.decode_request(received.frame).id
        listener.send(received.peer, m.Pong(request_id + 1000, ready_bytes=1))
        door = listener.doors[received.peer.door]
        door.send_multipart([received.peer.identity, b"\xff\xff"])
        door.send_multipart([received.peer.identity, b"two", b"parts"])
        listener.send(received.peer, m.Pong(request_id, ready_bytes=2))
        listener.send(received.peer, m.Pong(request_id, ready_bytes=3))

    echo.answer = answer
    with Client(echo.local) as client:
        first = client.call(m.Ping(0), WAIT_S)
        second = client.call(m.Ping(0), WAIT_S)
        assert client.receive() == []
    assert [first, second] == [m.Pong(1, ready_bytes=2), m.Pong(2, ready_bytes=2)]


def test_a_forgotten_request_is_not_answered_any_more(echo: Echo) -> None:
    with Client(echo.local) as client:
        client.call(m.Ping(0), WAIT_S)
        client.forget(client.send(m.Ping(0)))
        client.call(m.Ping(0), WAIT_S)
        assert client.receive() == []


def test_a_refusal_of_a_call_is_raised_with_its_code(echo: Echo) -> None:
    def refuse(listener: Listener, received: Received) -> None:
        assert received.frame is not None
        listener.send(received.peer, m.Refused(codec.decode_request(received.frame).id, m.REFUSED_BUSY, "full"))

    echo.answer = refuse
    with Client(echo.local) as client, pytest.raises(PeerRefused, match="full") as caught:
        client.call(m.Ping(0), WAIT_S)
    assert caught.value.code == m.REFUSED_BUSY


def test_a_client_that_never_reads_is_given_up_and_the_others_are_served(echo: Echo) -> None:
    outcomes: list[bool] = []
    big = m.Report(0, document=b"x" * 100_000)

    def flood(listener: Listener, received: Received) -> None:
        if received.frame == b"deaf":
            outcomes.extend([listener.send(received.peer, big) for _ in range(5000)])
        else:
            pong(listener, received)

    echo.answer = flood
    context = zmq.Context()
    deaf = context.socket(zmq.DEALER)
    deaf.setsockopt(zmq.RCVHWM, 1)
    deaf.connect(echo.local)
    deaf.send(b"deaf")
    with Client(echo.local) as client:
        client.call(m.Ping(0), WAIT_S)
        while not outcomes:
            client.call(m.Ping(0), WAIT_S)
    deaf.close(0)
    context.term()
    assert not all(outcomes)


def test_an_endpoint_in_use_is_told_by_that_name(echo: Echo) -> None:
    other = Listener()
    with pytest.raises(AddressInUse):
        other.bind(echo.tcp)
    other.close()


def test_nonsense_is_no_endpoint() -> None:
    with pytest.raises(WireError):
        Client("nonsense")


def test_a_tcp_door_that_is_made_anew_keeps_its_port_and_loses_its_connections() -> None:
    listener = Listener()
    endpoint = listener.bind("tcp://127.0.0.1:*")
    context = zmq.Context()
    unfinished = context.socket(zmq.DEALER)
    unfinished.connect(endpoint)
    unfinished.send(b"half", zmq.SNDMORE)
    with Client(endpoint) as client:
        received = _receive(listener, lambda: client.send(m.Ping(0)))
        former = listener.doors[0]
        assert listener.reopen(0)
        assert former.closed
        assert not listener.send(received.peer, m.Pong(1, ready_bytes=7))
        again = _receive(listener, lambda: client.send(m.Ping(0)))
        assert again.frame is not None
        assert codec.decode_request(again.frame).id > 1
        assert listener.doors[0].getsockopt_string(zmq.LAST_ENDPOINT) == endpoint
    unfinished.close(0)
    context.term()
    listener.close()


def test_a_local_door_is_not_made_anew(tmp_path: Path) -> None:
    listener = Listener()
    listener.bind(f"ipc://{tmp_path}/rpc")
    door = listener.doors[0]
    assert not listener.reopen(0)
    assert listener.doors == [door]
    listener.close()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:65536", "tcp://127.0.0.1:", "tcp://127.0.0.1:x"])
def test_what_is_no_port_is_refused(endpoint: str) -> None:
    listener = Listener()
    with pytest.raises(WireError, match=r"cannot listen on .*: Invalid argument"):
        listener.bind(endpoint)
    listener.close()


def _receive(listener: Listener, send: Callable[[], int]) -> Received:
    """The next message; ``send`` is repeated, since what is sent while a connection ends is lost."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(PeerSilent):
            send()
        listener.doors[0].poll(10)
        received = listener.receive(0)
        if received is not None:
            return received
    raise AssertionError("nothing arrived")
