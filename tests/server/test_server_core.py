"""The core's answer to a message from another machine, and to a fault of its own: no real client causes them here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from server_running import WAIT_S

from lmcache.errors import PeerSilent
from lmcache.metrics import Counters
from lmcache.server.core import Core, Ends
from lmcache.server.dispatch import Dispatcher
from lmcache.server.sessions import Sessions
from lmcache.system import SystemClock, SystemEntropy
from lmcache.wire import codec
from lmcache.wire import messages as m
from lmcache.wire.client import LOCAL_SCHEME, Client
from lmcache.wire.local import LocalListener
from lmcache.wire.peer import Peer, Received
from lmcache.wire.poller import Poller
from lmcache.wire.tcp import TcpListener, TcpPeer
from lmcache.wire.unix_listener import UnixListener


class Failing:
    """A dispatcher with a fault."""

    def answer(self, peer: Peer, request: m.Request) -> m.Reply:
        raise ZeroDivisionError(f"{peer} {request}")


class World:
    """A core with nothing behind it."""

    def __init__(self, folder: Path) -> None:
        self.counters = Counters()
        poller = Poller()
        self.tcp = TcpListener("tcp://127.0.0.1:*")
        poller.watch_socket(self.tcp.socket)
        self.entry = UnixListener(f"{folder}/rpc", None)
        self.local = LocalListener(self.entry, poller)
        self.endpoints = {"tcp": self.tcp.endpoint, "local": f"{LOCAL_SCHEME}{folder}/rpc"}
        ends = Ends(self.tcp, self.local, cast(Any, None), cast(Any, None), poller)
        rest = cast(Any, None)
        dispatcher = cast(Dispatcher, Failing())
        sessions = Sessions(SystemEntropy())
        self.core = Core(ends, rest, sessions, dispatcher, rest, self.counters, rest, rest, SystemClock(), rest)
        self.ends = ends

    def turn(self) -> None:
        """Wait for whoever has something to say, and answer."""
        sockets, fds = self.ends.poller.wait(WAIT_S)
        assert sockets or fds
        for fd in fds:
            assert self.local.attend(fd)
        self.core._serve(self.local)
        self.core._serve(self.tcp)

    def close(self) -> None:
        self.local.close()
        self.entry.close()
        self.ends.poller.close()
        self.tcp.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("request_", [m.Hello(5, version=m.WIRE_VERSION), m.Ping(5), m.Lookup(5, keys=b"k" * 32)])
def test_who_is_on_another_machine_is_refused_in_a_sentence_that_names_the_remedy(
    world: World, request_: m.Request
) -> None:
    reply = world.core._answer(Received(TcpPeer(world.tcp, b"x"), codec.encode(request_), "192.0.2.1"))
    assert isinstance(reply, m.Refused)
    assert (reply.id, reply.code) == (5, m.REFUSED_REMOTE)
    assert "run one lmcache server on each host" in reply.message


@pytest.mark.parametrize("way", ["local", "tcp"])
def test_a_fault_of_the_server_is_a_reply_a_count_and_a_line_and_the_loop_goes_on(
    world: World, caplog: pytest.LogCaptureFixture, way: str
) -> None:
    with Client(world.endpoints[way]) as client:
        for number in (1, 2):
            while not client._pending:
                with contextlib.suppress(PeerSilent):
                    client.send(m.Ping(0))
            while world.counters.faults < number:
                world.turn()
            assert client.poll(WAIT_S)
            (reply,) = client.receive()
            assert isinstance(reply, m.Refused)
            assert reply.code == m.REFUSED_INTERNAL
            assert world.counters.faults == number
    assert len(caplog.records) == 2
    assert "a ping request failed: ZeroDivisionError" in caplog.text
