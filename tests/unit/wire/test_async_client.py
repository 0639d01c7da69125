"""The event loop's client against a real listener: answers in any order, deadlines, refusals, and its end."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import zmq

from lmcache.errors import PeerRefused, PeerSilent
from lmcache.wire import codec
from lmcache.wire import messages as m
from lmcache.wire.async_client import AsyncClient
from lmcache.wire.peer import IN_FLIGHT_MAX, Listener, Received
from lmcache.wire.poller import Poller

WAIT_S = 10.0
Serve = Callable[[Listener, Received], None]


def talk(folder: Path, serve: Serve, scene: Callable[[AsyncClient], Coroutine[Any, Any, None]]) -> None:
    """Play a scene against a listener that treats every message with ``serve``, all in one event loop."""

    async def play() -> None:
        listener = Listener()
        client = AsyncClient(listener.bind(f"ipc://{folder}/rpc"))

        async def listen() -> None:
            while True:
                while (received := listener.receive(0)) is not None:
                    serve(listener, received)
                await asyncio.sleep(0.001)

        listening = asyncio.create_task(listen())
        try:
            await scene(client)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)
            await client.close()
            listener.close()

    asyncio.run(play())


def number_of(received: Received) -> int:
    assert received.frame is not None
    return codec.decode_request(received.frame).id


def test_answers_find_their_questions_in_any_order(tmp_path: Path) -> None:
    waiting: list[Received] = []

    def backwards(listener: Listener, received: Received) -> None:
        waiting.append(received)
        if len(waiting) == 3:
            for one in reversed(waiting):
                listener.send(one.peer, m.Pong(number_of(one), ready_bytes=number_of(one)))

    async def scene(client: AsyncClient) -> None:
        replies = await asyncio.gather(*(client.call(m.Ping(0), WAIT_S) for _ in range(3)))
        assert [reply.ready_bytes for reply in replies if isinstance(reply, m.Pong)] == [1, 2, 3]

    talk(tmp_path, backwards, scene)


def test_a_refusal_is_raised_with_its_code(tmp_path: Path) -> None:
    def refuse(listener: Listener, received: Received) -> None:
        listener.send(received.peer, m.Refused(number_of(received), m.REFUSED_OWNER, "not yours"))

    async def scene(client: AsyncClient) -> None:
        with pytest.raises(PeerRefused, match="not yours") as refused:
            await client.call(m.Ping(0), WAIT_S)
        assert refused.value.code == m.REFUSED_OWNER

    talk(tmp_path, refuse, scene)


def test_silence_ends_at_the_deadline_and_a_late_answer_is_nobodys(tmp_path: Path) -> None:
    late: list[Received] = []

    def slow(listener: Listener, received: Received) -> None:
        late.append(received)
        if len(late) == 2:
            for one in late:
                listener.send(one.peer, m.Pong(number_of(one), ready_bytes=number_of(one)))

    async def scene(client: AsyncClient) -> None:
        with pytest.raises(PeerSilent, match="within"):
            await client.call(m.Ping(0), 0.05)
        reply = await client.call(m.Ping(0), WAIT_S)
        assert isinstance(reply, m.Pong)
        assert reply.ready_bytes == 2  # not the late one's

    talk(tmp_path, slow, scene)


def test_what_is_no_answer_is_passed_over(tmp_path: Path) -> None:
    def babble(listener: Listener, received: Received) -> None:
        door = listener.doors[0]
        number = number_of(received)
        door.send_multipart([received.peer.identity, b"\xff nonsense"])
        door.send_multipart([received.peer.identity, codec.encode(m.Pong(number, ready_bytes=1)), b"one part too many"])
        listener.send(received.peer, m.Pong(number + 1, ready_bytes=2))  # of a question that nobody asked
        listener.send(received.peer, m.Pong(number, ready_bytes=3))
        listener.send(received.peer, m.Pong(number, ready_bytes=4))  # said twice

    async def scene(client: AsyncClient) -> None:
        reply = await client.call(m.Ping(0), WAIT_S)
        assert isinstance(reply, m.Pong)
        assert reply.ready_bytes == 3

    talk(tmp_path, babble, scene)


def test_no_more_than_a_bounded_number_of_questions_wait(tmp_path: Path) -> None:
    async def scene(client: AsyncClient) -> None:
        calls = [asyncio.create_task(client.call(m.Ping(0), WAIT_S)) for _ in range(IN_FLIGHT_MAX)]
        await asyncio.sleep(0)
        with pytest.raises(PeerSilent, match="unanswered"):
            await client.call(m.Ping(0), WAIT_S)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)

    talk(tmp_path, lambda *_: None, scene)


def test_who_waits_when_the_conversation_ends_is_told_so(tmp_path: Path) -> None:
    async def play() -> None:
        client = AsyncClient(f"ipc://{tmp_path}/nobody")
        call = asyncio.create_task(client.call(m.Ping(0), WAIT_S))
        listener = Listener()
        listener.bind(f"ipc://{tmp_path}/nobody")
        while listener.receive(0) is None:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(PeerSilent, match="was ended"):
            await call
        with pytest.raises(PeerSilent, match="cannot send"):
            await client.call(m.Ping(0), WAIT_S)
        listener.close()

    asyncio.run(play())


def test_a_poller_forgets_what_it_is_told_to_forget_and_tells_of_the_rest(tmp_path: Path) -> None:
    poller, listener = Poller(), Listener()
    listener.bind(f"ipc://{tmp_path}/rpc")
    fd = os.eventfd(1)
    poller.watch(fd)
    poller.watch_socket(listener.doors[0])
    assert poller.wait(0.0) == ([], [fd])
    poller.forget(fd)
    poller.forget(fd)  # twice is once
    assert poller.wait(0.0) == ([], [])
    context = zmq.Context()
    caller = context.socket(zmq.DEALER)
    caller.connect(f"ipc://{tmp_path}/rpc")
    caller.send(b"x")
    assert poller.wait(WAIT_S) == ([listener.doors[0]], [])
    poller.forget_socket(listener.doors[0])
    assert poller.wait(0.01) == ([], [])
    os.close(fd)
    poller.forget(fd)  # closed already: that is known, too
    caller.close(0)
    context.term()
    poller.close()
    with pytest.raises(ValueError, match="closed"):
        poller.forget(fd)
    listener.close()
