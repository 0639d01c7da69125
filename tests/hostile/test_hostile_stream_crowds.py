"""Crowds at the socket of attached processes: memory and descriptors are bounded, and who was there goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import select
from collections.abc import Iterator

import pytest
from framed import Caller, framed
from server_running import Engine, Engines, Server, eventually, key
from witness import watched

from lmcache.errors import PeerSilent
from lmcache.wire import codec
from lmcache.wire import messages as m
from lmcache.wire.client import Client
from lmcache.wire.local import CONNECTIONS_MAX, HELD_BYTES_MAX

MIB = 1 << 20
PING = framed(codec.encode(m.Ping(7)))
HALF = MIB.to_bytes(4, "little") + b"x" * (MIB - 1)


@pytest.fixture
def crowd() -> Iterator[contextlib.ExitStack]:
    """Holds thousands of connections, for which this process may need more descriptors than it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        yield stack
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def num_open(callers: list[Caller]) -> int:
    """How many the server has not hung up on."""
    poll = select.poll()
    for caller in callers:
        poll.register(caller.socket, 0)
    return len(callers) - sum(bool(events & select.POLLHUP) for _, events in poll.poll(0))


def long_lookup(engine: Engine) -> m.Reply:
    """A request of 256 KiB, which arrives in pieces."""
    reply: m.Reply = engine.call(m.Lookup(0, keys=key("x") * m.KEYS_MAX, lease=False))
    return reply


def test_beginnings_of_frames_on_many_connections_do_not_add_up(
    own: Server, engines: Engines, crowd: contextlib.ExitStack
) -> None:
    room = HELD_BYTES_MAX // MIB
    engine, unlucky = engines(own), engines(own)
    with watched(own, growth_mib=1.5 * room), crowd:
        halves = [crowd.enter_context(Caller(own.local_path)) for _ in range(2 * room)]
        for half in halves:
            half.try_send(HALF)
        eventually(lambda: num_open(halves) <= room, "who goes beyond is out")
        assert num_open(halves) > room // 2
        assert engine.store([("beside halves", os.getpid())]) == 1
        with contextlib.suppress(PeerSilent):  # there may be no room for it now
            long_lookup(unlucky)
        assert engines(own).store([("beside halves, later", os.getpid())]) == 1
    assert isinstance(long_lookup(engines(own)), m.Found)
    assert isinstance(long_lookup(engine), m.Found)


def test_answers_that_nobody_reads_on_many_connections_do_not_add_up(
    own: Server, engines: Engines, crowd: contextlib.ExitStack
) -> None:
    engine = engines(own)
    with watched(own, growth_mib=128), crowd:
        deaf = [crowd.enter_context(Caller(own.local_path)) for _ in range(1000)]
        for caller in deaf:
            caller.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                caller.send(PING * 20_000)
        assert engine.store([("beside the deaf", os.getpid())]) == 1
        assert num_open(deaf) == len(deaf)
        deaf[0].socket.settimeout(30.0)
        assert isinstance(deaf[0].read_reply(), m.Pong)


@pytest.mark.parametrize("body", [b"", b"x", b"xy", codec.encode(m.Ping(7))], ids=["0", "1", "2", "ping"])
def test_thousands_of_tiny_frames_on_thousands_of_connections_take_no_memory_to_speak_of(
    own: Server, crowd: contextlib.ExitStack, body: bytes
) -> None:
    data = framed(body)
    data *= (64 << 10) // len(data)
    with watched(own, growth_mib=HELD_BYTES_MAX // MIB), crowd:
        callers = [crowd.enter_context(Caller(own.local_path)) for _ in range(2000)]
        for caller in callers:
            caller.socket.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                caller.send(data)


def test_connections_beyond_the_limit_are_turned_away_and_those_before_go_on(
    own: Server, engines: Engines, crowd: contextlib.ExitStack
) -> None:
    engine = engines(own)
    before = len(os.listdir(f"/proc/{own.process.pid}/fd"))
    with watched(own, growth_mib=128), crowd:
        callers = [crowd.enter_context(Caller(own.local_path)) for _ in range(CONNECTIONS_MAX + 500)]
        eventually(lambda: num_open(callers) < CONNECTIONS_MAX, "who is too many is out")
        assert num_open(callers) > CONNECTIONS_MAX - 50
        for caller in callers[:1000]:
            caller.send(PING)
            assert isinstance(caller.read_reply(), m.Pong)
        assert callers[-1].is_hung_up()
        with pytest.raises(PeerSilent), Client(own.way("local")) as late:
            late.call(m.Ping(0), 30.0)
        assert engine.store([("before the crowd", os.getpid())]) == 1
    eventually(lambda: len(os.listdir(f"/proc/{own.process.pid}/fd")) <= before, "descriptors are closed")
    assert engines(own).store([("after the crowd", os.getpid())]) == 1
