"""The socket of attached processes: whatever is sent there, its sender alone gets an error, and is never lied to."""

from __future__ import annotations

import array
import contextlib
import os
import random
import select
import socket
import threading

import msgspec
import pytest
from absurd import absurd
from framed import Caller, framed, stopped
from server_running import Engine, Engines, Server, eventually, key
from witness import watched

from lmcache.wire import codec
from lmcache.wire import messages as m

VERSION = bytes([m.WIRE_VERSION])
PING = framed(codec.encode(m.Ping(7)))
CONVERSATION = framed(codec.encode(m.Hello(1, version=m.WIRE_VERSION)), codec.encode(m.Lookup(2, keys=key("x")))) + PING


def num_fds(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def is_ponged(caller: Caller, number: int = 7) -> bool:
    """Whether the next thing it hears is the answer to that ping."""
    reply = caller.read_reply()
    return isinstance(reply, m.Pong) and reply.id == number


def test_a_conversation_that_is_cut_anywhere_hurts_nobody_and_leaves_nothing(besieged: Server) -> None:
    before = num_fds(besieged)
    with watched(besieged):
        with contextlib.ExitStack() as stack:
            for cut in range(len(CONVERSATION) + 1):
                silent, gone, done = (Caller(besieged.local_path) for _ in range(3))
                for caller in (silent, gone, done):
                    stack.enter_context(caller)
                    caller.send(CONVERSATION[:cut])
                gone.close()
                done.socket.shutdown(socket.SHUT_WR)
                assert done.is_hung_up()
        eventually(lambda: num_fds(besieged) <= before + 2, "descriptors are closed")  # the witness has two


def test_a_conversation_with_a_wrong_byte_anywhere_is_refused_or_ended_and_hurts_nobody(besieged: Server) -> None:
    source, faults = random.Random(5), besieged.metric("faults_total")
    with watched(besieged), contextlib.ExitStack() as stack:
        for place in range(len(CONVERSATION)):
            for _ in range(8):
                data = bytearray(CONVERSATION)
                data[place] ^= source.randrange(1, 256)
                stack.enter_context(Caller(besieged.local_path)).try_send(bytes(data))
        assert is_ponged_by_all(besieged)
    assert besieged.metric("faults_total") == faults


def is_ponged_by_all(server: Server) -> bool:
    with Caller(server.local_path) as caller:
        caller.send(PING)
        return is_ponged(caller)


@pytest.mark.parametrize("start", [b"", framed(b""), PING, VERSION, b"\xff\xff\x0f\0"], ids=lambda start: start.hex())
def test_random_bytes_on_two_hundred_connections_hurt_nobody(besieged: Server, engines: Engines, start: bytes) -> None:
    engine, source = engines(besieged), random.Random(7)
    with watched(besieged), contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(Caller(besieged.local_path)).try_send(start + source.randbytes(4096))
        assert engine.store([("after the noise", start, os.getpid())]) == 1


@pytest.mark.parametrize("length", [m.FRAME_BYTES_MAX + 1, 1 << 31, (1 << 32) - 1])
def test_an_announced_giant_costs_its_sender_the_connection_and_no_memory(besieged: Server, length: int) -> None:
    malformed = besieged.metric("malformed_total")
    with watched(besieged), contextlib.ExitStack() as stack:
        giants = [stack.enter_context(Caller(besieged.local_path)) for _ in range(50)]
        for number, giant in enumerate(giants):
            giant.send(PING)
            giant.try_send(length.to_bytes(4, "little") + PING * (number * 200))
        for giant in giants:
            assert is_ponged(giant)  # what came before it is answered, and nothing that comes after
            with pytest.raises(ConnectionResetError):
                giant.read_frame()
    assert besieged.metric("malformed_total") == malformed + 50


def test_the_longest_frame_is_taken_and_an_empty_or_tiny_one_is_no_message(besieged: Server) -> None:
    malformed = besieged.metric("malformed_total")
    with watched(besieged), Caller(besieged.local_path) as caller:
        caller.send(framed(VERSION + bytes(m.FRAME_BYTES_MAX - 1)) + PING)
        assert is_ponged(caller)
        for _ in range(1000):
            caller.send(framed(b"", b"x", b"", VERSION) + PING)
            assert is_ponged(caller)
    assert besieged.metric("malformed_total") == malformed + 4001


def test_a_frame_in_pieces_of_one_byte_is_answered(besieged: Server) -> None:
    with watched(besieged), Caller(besieged.local_path) as caller:
        for byte in CONVERSATION:
            caller.send(bytes([byte]))
        kinds = [type(caller.read_reply()) for _ in range(3)]
    assert kinds == [m.Welcome, m.Refused, m.Pong]


@pytest.mark.parametrize("is_last", [False, True], ids=["talks on", "says no more"])
def test_many_frames_in_one_send_are_all_answered_in_order(besieged: Server, is_last: bool) -> None:
    with watched(besieged), Caller(besieged.local_path) as caller:
        caller.send(framed(*[codec.encode(m.Ping(number)) for number in range(10_000)]))
        if is_last:
            caller.socket.shutdown(socket.SHUT_WR)
        assert [caller.read_reply().id for _ in range(10_000)] == list(range(10_000))
        if is_last:
            assert caller.is_hung_up()


def test_the_same_token_used_by_many_connections_serves_the_last_one_only(besieged: Server, engines: Engines) -> None:
    token = engines(besieged).attachment.reply.token
    with contextlib.ExitStack() as stack:
        callers = [stack.enter_context(Caller(besieged.local_path)) for _ in range(30)]
        for caller in callers:
            assert isinstance(caller.ask(m.Hello(1, version=m.WIRE_VERSION, token=token)), m.Welcome)
        replies = [caller.ask(m.Lookup(2, keys=key("x"), lease=False)) for caller in callers]
    assert [type(reply) for reply in replies] == [m.Refused] * 29 + [m.Found]


def test_wrong_guesses_of_tokens_bind_nobody_and_are_all_answered(besieged: Server) -> None:
    source = random.Random(11)
    with watched(besieged), Caller(besieged.local_path) as caller:
        for number in range(2000):
            token = source.randbytes(source.choice([0, 1, 15, 16, 17, 4096])) or b"\0"
            reply = caller.ask(m.Hello(number, version=m.WIRE_VERSION, token=token))
            assert isinstance(reply, m.Refused)
            assert reply.code == m.REFUSED_UNKNOWN


def test_a_malformed_frame_costs_an_engine_its_binding_and_a_giant_its_connection_but_nothing_it_holds(
    besieged: Server, engines: Engines
) -> None:
    engine = engines(besieged)
    names: list[object] = [("held", os.urandom(8))]
    granted = engine.reserve(names)
    checksums = engine.write(granted, names)
    token = engine.attachment.reply.token
    for bad, is_end in ((framed(VERSION + b"nonsense"), False), (b"\xff" * 8, True)):
        with Caller(besieged.local_path) as caller:
            assert isinstance(caller.ask(m.Hello(1, version=m.WIRE_VERSION, token=token)), m.Welcome)
            caller.send(bad)
            if is_end:
                assert caller.is_hung_up()
            else:
                assert isinstance(caller.ask(m.Lookup(2, keys=key("x"))), m.Refused)
    engine.hello(token)
    assert engine.call(m.Commit(0, ticket=granted.ticket, checksums=checksums)).num_chunks == 1


def test_every_message_with_absurd_numbers_is_answered_and_breaks_nothing(besieged: Server, engines: Engines) -> None:
    engine, faults = engines(besieged), besieged.metric("faults_total")
    kinds = [kind for kind in m.Request.__args__ if kind not in (m.Bye, m.Hello)]
    source = random.Random(3)
    hello = m.Hello(1, version=m.WIRE_VERSION, token=engine.attachment.reply.token)
    with watched(besieged), Caller(besieged.local_path) as caller:
        for number in range(3000):
            kind = source.choice(kinds)
            fields = [absurd(field.type, source) for field in msgspec.structs.fields(kind)[1:]]
            assert isinstance(caller.ask(hello), m.Welcome)
            caller.send(framed(VERSION + msgspec.msgpack.encode([kind.__struct_config__.tag, number, *fields])))
            assert caller.read_reply().id == number
    assert besieged.metric("faults_total") == faults


def test_descriptors_that_are_sent_to_the_server_are_closed_not_kept(besieged: Server) -> None:
    before = num_fds(besieged)
    reader, writer = os.pipe()
    with watched(besieged), contextlib.ExitStack() as stack:
        for data in (b"x", PING, PING[:3]):
            caller = stack.enter_context(Caller(besieged.local_path))
            for _ in range(20):
                fds = array.array("i", [writer] * 100)
                with contextlib.suppress(OSError):
                    caller.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert pipe.read() == b""  # ends only when nobody has the other end
    eventually(lambda: num_fds(besieged) <= before, "descriptors are closed")


def test_many_connections_that_come_and_go_leave_nothing(besieged: Server) -> None:
    def come_and_go() -> None:
        for number in range(500):
            with Caller(besieged.local_path) as caller:
                caller.send(CONVERSATION[: number % (len(CONVERSATION) + 1)])
                if number % 3 == 0:
                    caller.socket.shutdown(socket.SHUT_WR if number % 2 else socket.SHUT_RD)
                    assert number % 2 == 0 or caller.is_hung_up()

    before = num_fds(besieged)
    with watched(besieged):
        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    eventually(lambda: num_fds(besieged) <= before, "descriptors are closed")


def test_three_hundred_thousand_requests_whose_answers_nobody_reads_stop_their_sender_and_none_is_lost(
    besieged: Server,
) -> None:
    num, unsent = 300_000, besieged.metric("unsent_total")
    data = framed(*[codec.encode(m.Ping(number)) for number in range(num)])
    with watched(besieged), Caller(besieged.local_path) as deaf:
        deaf.socket.setblocking(False)
        num_sent = 0
        while num_sent < len(data) and select.select([], [deaf.socket], [], 2.0)[1]:
            num_sent += deaf.socket.send(data[num_sent : num_sent + (1 << 16)])
        assert num_sent < len(data) // 2
        assert besieged.healthy()
        answers = bytearray()
        ids: list[int] = []
        while len(ids) < num:
            readable, writable, _ = select.select([deaf.socket], [deaf.socket] * (num_sent < len(data)), [], 30.0)
            assert readable or writable
            if readable:
                answers += deaf.socket.recv(1 << 16)
                ids += taken(answers)
            if writable:
                num_sent += deaf.socket.send(data[num_sent : num_sent + (1 << 16)])
    assert ids == list(range(num))
    assert besieged.metric("unsent_total") == unsent


def taken(data: bytearray) -> list[int]:
    """The ids of the whole replies at the beginning of ``data``, from which they are removed."""
    ids: list[int] = []
    start = 0
    while len(data) - start >= 4:
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        if end > len(data):
            break
        ids.append(codec.decode_reply(bytes(data[start + 4 : end])).id)
        start = end
    del data[:start]
    return ids


class Speaker(Caller):
    """A connection that speaks for an engine."""

    def __init__(self, server: Server, engine: Engine) -> None:
        super().__init__(server.local_path)
        assert isinstance(self.ask(m.Hello(1, version=m.WIRE_VERSION, token=engine.attachment.reply.token)), m.Welcome)


@pytest.mark.parametrize("num_floods", [1, 40])
def test_who_floods_is_served_in_turn_with_who_does_not(besieged: Server, engines: Engines, num_floods: int) -> None:
    """A flood asks again and again for a chunk that somebody commits after it: how often does it hear "not there"?"""
    names: list[object] = [("late", os.urandom(8))]
    shy = engines(besieged)
    granted = shy.reserve(names)
    commit = m.Commit(9, ticket=granted.ticket, checksums=shy.write(granted, names))
    look = framed(codec.encode(m.Lookup(5, keys=key(names[0]), lease=False)))
    with watched(besieged), contextlib.ExitStack() as stack:
        floods = [stack.enter_context(Speaker(besieged, engines(besieged))) for _ in range(num_floods)]
        polite = stack.enter_context(Speaker(besieged, shy))
        with stopped(besieged):
            for flood in floods:
                flood.send(look * 500)
            polite.send(framed(codec.encode(commit)))
        num_before = 0
        for flood in floods:
            found = [flood.read_reply() for _ in range(500)]
            num_before += sum(isinstance(reply, m.Found) and reply.num_chunks == 0 for reply in found)
        assert isinstance(polite.read_reply(), m.Committed)
    assert num_before <= 2 * num_floods


@pytest.mark.parametrize("num_floods", [1, 100])
def test_a_flood_that_goes_on_holds_nobody_up(besieged: Server, engines: Engines, num_floods: int) -> None:
    done = threading.Event()

    def flood() -> None:
        with Caller(besieged.local_path) as caller:
            while not done.is_set():
                caller.send(PING * 200)
                assert all(is_ponged(caller) for _ in range(200))

    threads = [threading.Thread(target=flood) for _ in range(num_floods)]
    with watched(besieged):
        engine = engines(besieged)
        for thread in threads:
            thread.start()
        try:
            for number in range(50):
                names: list[object] = [("in a flood", num_floods, os.getpid(), number)]
                assert engine.store(names) == 1
                assert engine.verified(engine.lookup(names, lease=False), names) == [True]
        finally:
            done.set()
            for thread in threads:
                thread.join()
