"""A scheduler's session with a real server: what it leaves behind, and what it never waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from server_running import WAIT_S, Engines, Server, eventually, key

from lmcache.connectors.link import Address, Link
from lmcache.connectors.session import SchedulerSession
from lmcache.wire.client import Client
from lmcache.wire.messages import Register
from lmcache.wire.stream import Stream
from lmcache.wire.tcp import Dealer


@pytest.fixture
def session(own: Server) -> Iterator[SchedulerSession]:
    registration = Register(0, role="scheduler", model="tiny", engine="test", rank=0, world_size=1, extent_bytes=0)
    link = Link(Address("tcp://127.0.0.1", own.rpc_port), "test scheduler", False, lambda _: registration)
    link.wait_first_try(WAIT_S)
    made = SchedulerSession(link)
    eventually(lambda: made.chunk_tokens)
    yield made
    made.close()


def test_a_cancelled_question_leaves_no_lease_though_the_engine_takes_no_further_step(
    own: Server, engines: Engines, session: SchedulerSession
) -> None:
    engines(own).store(["cancelled"])
    for _ in range(50):
        question = session.ask([key("cancelled")])
        assert question is not None
        session.cancel(question)
        assert question.over
        assert question.answer is None
    eventually(lambda: own.metric("l1_memory_leased_bytes") == 0)
    asked = session.ask([key("cancelled")])
    assert asked is not None
    eventually(lambda: session.poll(asked))
    assert asked.answer is not None
    eventually(lambda: own.metric("l1_memory_leased_bytes") > 0)
    session.cancel(asked)
    eventually(lambda: own.metric("l1_memory_leased_bytes") == 0)


def test_the_engines_thread_closes_no_conversation_over_zmq_whose_end_waits_for_zmqs_threads(
    own: Server, session: SchedulerSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed_by: dict[type, set[str]] = {Stream: set(), Dealer: set()}
    close = Client.close

    def noted(client: Client) -> None:
        closed_by[type(client._line)].add(threading.current_thread().name)
        close(client)

    assert session.chunk_tokens
    monkeypatch.setattr(Client, "close", noted)
    own.kill()
    eventually(lambda: session.chunk_tokens is None)
    eventually(lambda: closed_by[Dealer] and closed_by[Stream])
    assert closed_by[Dealer] == {"lmcache link (test scheduler)"}
    assert closed_by[Stream] <= {"lmcache link (test scheduler)", threading.current_thread().name}
