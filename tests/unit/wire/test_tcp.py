"""The tcp end of the server: its port, and a ROUTER that can be made anew on it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
import zmq

from lmcache.errors import PeerSilent, WireError
from lmcache.wire import codec
from lmcache.wire import messages as m
from lmcache.wire.client import Client
from lmcache.wire.peer import Received
from lmcache.wire.tcp import AddressInUse, TcpListener

WAIT_S = 10.0


def test_an_endpoint_in_use_is_told_by_that_name() -> None:
    listener = TcpListener("tcp://127.0.0.1:*")
    with pytest.raises(AddressInUse):
        TcpListener(listener.endpoint)
    listener.close()


def test_one_that_is_made_anew_keeps_its_port_and_loses_its_connections() -> None:
    listener = TcpListener("tcp://127.0.0.1:*")
    endpoint = listener.endpoint
    context = zmq.Context()
    unfinished = context.socket(zmq.DEALER)
    unfinished.connect(endpoint)
    unfinished.send(b"half", zmq.SNDMORE)
    with Client(endpoint) as client:
        received = _receive(listener, lambda: client.send(m.Ping(0)))
        assert received.address == "127.0.0.1"
        former = listener.socket
        listener.reopen()
        assert former.closed
        assert not received.peer.send(m.Pong(1, ready_bytes=7))
        again = _receive(listener, lambda: client.send(m.Ping(0)))
        assert again.frame is not None
        assert codec.decode_request(again.frame).id > 1
        assert again.peer != received.peer
        assert listener.endpoint == endpoint
    unfinished.close(0)
    context.term()
    listener.close()


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:65536", "tcp://127.0.0.1:", "tcp://127.0.0.1:x"])
def test_what_is_no_port_is_refused(endpoint: str) -> None:
    with pytest.raises(WireError, match=r"cannot listen on .*: Invalid argument"):
        TcpListener(endpoint)


def _receive(listener: TcpListener, send: Callable[[], int]) -> Received:
    """The next message; ``send`` is repeated, since what is sent while a connection ends is lost."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(PeerSilent):
            send()
        listener.socket.poll(10)
        received = listener.receive()
        if received is not None:
            return received
    raise AssertionError("nothing arrived")
