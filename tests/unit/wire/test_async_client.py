"""The event loop's client against a real listener: answers in any order, deadlines, refusals, and its end."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq

from lmcache.errors import PeerRefused, PeerSilent
from lmcache.wire import codec
from lmcache.wire import messages as m
from lmcache.wire.async_client import AsyncClient, open_client
from lmcache.wire.client import LOCAL_SCHEME
from lmcache.wire.local import LocalListener, LocalPeer
from lmcache.wire.messages import IN_FLIGHT_MAX
from lmcache.wire.peer import Received
from lmcache.wire.poller import Poller
from lmcache.wire.tcp import TcpListener
from lmcache.wire.unix_listener import UnixListener

WAIT_S = 10.0
Serve = Callable[[Received], None]
Scene = Callable[[AsyncClient, LocalListener], Coroutine[Any, Any, None]]


def talk(folder: Path, serve: Serve, scene: Scene) -> None:
    """Play a scene against a listener that treats every message with ``serve``, all in one event loop."""

    async def play() -> None:
        poller = Poller()
        entry = UnixListener(f"{folder}/rpc", None)
        listener = LocalListener(entry, poller)

        async def listen() -> None:
            while True:
                for fd in poller.wait(0.0)[1]:
                    listener.attend(fd)
                while (received := listener.receive()) is not None:
                    serve(received)
                await asyncio.sleep(0.001)

        listening = asyncio.create_task(listen())
        client = await open_client(f"{LOCAL_SCHEME}{folder}/rpc")
        try:
            await scene(client, listener)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await client.close()
            listener.close()
            entry.close()
            poller.close()

    asyncio.run(play())


def number_of(received: Received) -> int:
    assert received.frame is not None
    return codec.decode_request(received.frame).id


def test_answers_find_their_questions_in_any_order(tmp_path: Path) -> None:
    waiting: list[Received] = []

    def backwards(received: Received) -> None:
        waiting.append(received)
        if len(waiting) == 3:
            for one in reversed(waiting):
                one.peer.send(m.Pong(number_of(one), ready_bytes=number_of(one)))

    async def scene(client: AsyncClient, _: LocalListener) -> None:
        replies = await asyncio.gather(*(client.call(m.Ping(0), WAIT_S) for _ in range(3)))
        assert [reply.ready_bytes for reply in replies if isinstance(reply, m.Pong)] == [1, 2, 3]

    talk(tmp_path, backwards, scene)


def test_a_refusal_is_raised_with_its_code(tmp_path: Path) -> None:
    def refuse(received: Received) -> None:
        received.peer.send(m.Refused(number_of(received), m.REFUSED_OWNER, "not yours"))

    async def scene(client: AsyncClient, _: LocalListener) -> None:
        with pytest.raises(PeerRefused, match="not yours") as refused:
            await client.call(m.Ping(0), WAIT_S)
        assert refused.value.code == m.REFUSED_OWNER

    talk(tmp_path, refuse, scene)


def test_silence_ends_at_the_deadline_and_a_late_answer_is_nobodys(tmp_path: Path) -> None:
    late: list[Received] = []

    def slow(received: Received) -> None:
        late.append(received)
        if len(late) == 2:
            for one in late:
                one.peer.send(m.Pong(number_of(one), ready_bytes=number_of(one)))

    async def scene(client: AsyncClient, _: LocalListener) -> None:
        with pytest.raises(PeerSilent, match="within"):
            await client.call(m.Ping(0), 0.05)
        reply = await client.call(m.Ping(0), WAIT_S)
        assert isinstance(reply, m.Pong)
        assert reply.ready_bytes == 2  # not the late one's

    talk(tmp_path, slow, scene)


def test_what_is_no_answer_is_passed_over(tmp_path: Path) -> None:
    def babble(received: Received) -> None:
        number = number_of(received)
        assert isinstance(received.peer, LocalPeer)
        received.peer.stream.send(b"\xff nonsense")
        received.peer.stream.send(b"")
        received.peer.send(m.Pong(number + 1, ready_bytes=2))  # of a question that nobody asked
        received.peer.send(m.Pong(number, ready_bytes=3))
        received.peer.send(m.Pong(number, ready_bytes=4))  # said twice

    async def scene(client: AsyncClient, _: LocalListener) -> None:
        reply = await client.call(m.Ping(0), WAIT_S)
        assert isinstance(reply, m.Pong)
        assert reply.ready_bytes == 3

    talk(tmp_path, babble, scene)


def test_no_more_than_a_bounded_number_of_questions_wait(tmp_path: Path) -> None:
    async def scene(client: AsyncClient, _: LocalListener) -> None:
        calls = [asyncio.create_task(client.call(m.Ping(0), WAIT_S)) for _ in range(IN_FLIGHT_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(PeerSilent, match="unanswered"):
            await client.call(m.Ping(0), WAIT_S)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    talk(tmp_path, lambda *_: None, scene)


def test_who_waits_when_the_conversation_is_ended_from_here_is_told_so(tmp_path: Path) -> None:
    arrived: list[Received] = []

    async def scene(client: AsyncClient, _: LocalListener) -> None:
        call = asyncio.create_task(client.call(m.Ping(0), WAIT_S))
        while not arrived:
            await asyncio.sleep(0.001)
        await client.close()
        with pytest.raises(PeerSilent, match="was ended"):
            await call
        assert client.is_over
        with pytest.raises(PeerSilent, match="was ended"):
            await client.call(m.Ping(0), WAIT_S)

    talk(tmp_path, arrived.append, scene)


def test_the_cores_end_is_told_at_once_to_all_who_wait(tmp_path: Path) -> None:
    arrived: list[Received] = []

    async def scene(client: AsyncClient, listener: LocalListener) -> None:
        calls = [asyncio.create_task(client.call(m.Ping(0), 3600.0)) for _ in range(3)]
        while len(arrived) < 3:
            await asyncio.sleep(0.001)
        listener.close()
        for call in calls:
            with pytest.raises(PeerSilent, match="was ended"):
                await call
        assert client.is_over

    talk(tmp_path, arrived.append, scene)


def test_a_reply_longer_than_any_ends_the_conversation(tmp_path: Path) -> None:
    def shout(received: Received) -> None:
        assert isinstance(received.peer, LocalPeer)
        received.peer.stream._send((m.FRAME_BYTES_MAX + 1).to_bytes(4, "little"))

    async def scene(client: AsyncClient, _: LocalListener) -> None:
        with pytest.raises(PeerSilent, match="was ended"):
            await client.call(m.Ping(0), 3600.0)

    talk(tmp_path, shout, scene)


def test_nobody_at_the_path_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(PeerSilent, match=r"nobody answers at .*: No such file"):
        asyncio.run(open_client(f"{LOCAL_SCHEME}{tmp_path}/nobody"))


def test_a_poller_forgets_what_it_is_told_to_forget_and_tells_of_the_rest() -> None:
    poller, listener = Poller(), TcpListener("tcp://127.0.0.1:*")
    fd = os.eventfd(1)
    poller.watch(fd)
    poller.watch_socket(listener.socket)
    assert poller.wait(0.0) == ([], [fd])
    poller.forget(fd)
    poller.forget(fd)  # twice is once
    assert poller.wait(0.0) == ([], [])
    context = zmq.Context()
    caller = context.socket(zmq.DEALER)
    caller.connect(listener.endpoint)
    caller.send(b"x")
    assert poller.wait(WAIT_S) == ([listener.socket], [])
    poller.forget_socket(listener.socket)
    assert poller.wait(0.01) == ([], [])
    os.close(fd)
    poller.forget(fd)  # closed already: that is known, too
    caller.close(0)
    context.term()
    poller.close()
    with pytest.raises(ValueError, match="closed"):
        poller.forget(fd)
    listener.close()


def test_a_poller_reports_what_can_be_written_to_only_when_it_is_asked_to() -> None:
    poller = Poller()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        poller.watch(ours.fileno())
        assert poller.wait(0.0) == ([], [])
        poller.turn_to(ours.fileno(), writable=True)
        assert poller.wait(0.0) == ([], [ours.fileno()])
        poller.turn_to(ours.fileno(), writable=False)
        assert poller.wait(0.0) == ([], [])
        theirs.send(b"x")
        assert poller.wait(WAIT_S) == ([], [ours.fileno()])
        poller.forget(ours.fileno())
    poller.close()
