"""The ZMQ door: whatever a stranger or an engine sends, it alone gets an error, and nothing changes for others."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import zmq
from absurd import absurd
from server_running import EXTENT_BYTES, WAIT_S, Engine, Engines, Server, eventually, key
from witness import watched
from zmtp import COMMAND, GREETING, LONG, Stranger, frame, ready

from lmcache.errors import PeerRefused
from lmcache.wire import codec
from lmcache.wire import messages as m

VERSION = bytes([m.WIRE_VERSION])
PING = frame(codec.encode(m.Ping(7)))
CONVERSATION = GREETING + ready() + PING
OTHERS_ID = (1 << 62) + 12345


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), WAIT_S)


def send(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(data)


def test_a_conversation_that_is_cut_anywhere_hurts_nobody(besieged: Server) -> None:
    with watched(besieged), contextlib.ExitStack() as stack:
        for cut in range(len(CONVERSATION) + 1):
            silent, gone = connect(besieged.rpc_port), connect(besieged.rpc_port)
            stack.enter_context(silent)
            send(silent, CONVERSATION[:cut])
            send(gone, CONVERSATION[:cut])
            gone.close()


def test_a_conversation_with_a_wrong_byte_anywhere_hurts_nobody(besieged: Server) -> None:
    source = random.Random(5)
    with watched(besieged), contextlib.ExitStack() as stack:
        for place in range(len(CONVERSATION)):
            data = bytearray(CONVERSATION)
            data[place] ^= source.randrange(1, 256)
            send(stack.enter_context(connect(besieged.rpc_port)), bytes(data))


@pytest.mark.parametrize("version", [0, 1, 2])
def test_old_zmtp_with_messages_of_ours_is_not_understood(besieged: Server, version: int) -> None:
    body = codec.encode(m.Ping(7))
    old = b"\xff" + b"\0" * 8 + b"\x7f" + bytes([version, 5]) + b"\0\0" + bytes([0, len(body)]) + body
    unversioned = bytes([1, 0]) + bytes([len(body) + 1, 0]) + body
    before = besieged.metric("requests_total")
    with watched(besieged), contextlib.ExitStack() as stack:
        for _ in range(100):
            send(stack.enter_context(connect(besieged.rpc_port)), old if version else unversioned)
    assert besieged.metric("requests_total") > before  # the witness was served, in the same door


HEADERS = {
    "1 GiB": bytes([LONG]) + (1 << 30).to_bytes(8, "big"),
    "8 EiB": bytes([LONG]) + ((1 << 63) - 1).to_bytes(8, "big"),
    "negative": bytes([LONG]) + b"\xff" * 8,
    "command of 1 GiB": bytes([LONG | COMMAND]) + (1 << 30).to_bytes(8, "big"),
    "all flags": b"\xff" + (1 << 40).to_bytes(8, "big"),
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_an_announced_giant_costs_its_sender_the_connection_and_no_memory(besieged: Server, header: bytes) -> None:
    with watched(besieged), contextlib.ExitStack() as stack:
        giants = [stack.enter_context(Stranger(besieged.rpc_port)) for _ in range(50)]
        for giant in giants:
            send(giant.socket, header + b"x" * 4096)
        assert all(giant.is_hung_up() for giant in giants)


def test_two_thousand_half_open_connections_leave_room_for_others(besieged: Server, engines: Engines) -> None:
    with watched(besieged, growth_mib=128), contextlib.ExitStack() as stack:
        for number in range(2000):
            try:
                connection = stack.enter_context(connect(besieged.rpc_port))
            except OSError:
                break
            send(connection, CONVERSATION[: number % len(GREETING)])
        assert number > 800
        assert engines(besieged).store([("while half open", os.getpid())]) == 1


def test_three_hundred_thousand_requests_whose_replies_nobody_reads_stop_nobody(besieged: Server) -> None:
    asked, unsent = besieged.metric("requests_total"), besieged.metric("unsent_total")
    with watched(besieged, growth_mib=128), zmq.Context() as context, context.socket(zmq.DEALER) as deaf:
        deaf.setsockopt(zmq.LINGER, 0)
        deaf.setsockopt(zmq.RCVHWM, 1)
        deaf.setsockopt(zmq.SNDTIMEO, int(WAIT_S * 1000))
        deaf.connect(besieged.rpc)
        frames = [codec.encode(m.Ping(number)) for number in range(1000)]
        for _ in range(300):
            for ping in frames:
                deaf.send(ping)
        eventually(lambda: besieged.metric("requests_total") >= asked + 300_000, "all were taken")
        assert besieged.metric("unsent_total") > unsent


def test_who_takes_another_connections_identity_gets_nothing_of_its_answers(besieged: Server) -> None:
    with watched(besieged), Stranger(besieged.rpc_port, identity=b"same") as first:
        first.send(PING)
        assert codec.decode_reply(first.read_message()).id == 7
        with contextlib.ExitStack() as stack:
            for _ in range(20):
                with contextlib.suppress(OSError):
                    second = stack.enter_context(Stranger(besieged.rpc_port, identity=b"same"))
                    second.send(frame(codec.encode(m.Ping(9))))
            for number in range(100):
                first.send(frame(codec.encode(m.Ping(number))))
                assert codec.decode_reply(first.read_message()).id == number


def test_an_identity_cannot_be_taken_over_to_speak_for_a_bound_engine(besieged: Server, engines: Engines) -> None:
    """ROUTER handover would let a second connection of the same name inherit the binding of the first."""
    engine = engines(besieged)
    with zmq.Context() as context, context.socket(zmq.DEALER) as bound, context.socket(zmq.DEALER) as thief:
        for dealer in (bound, thief):
            dealer.setsockopt(zmq.LINGER, 0)
            dealer.setsockopt(zmq.RCVTIMEO, 2000)
            dealer.setsockopt(zmq.IDENTITY, b"engine")
        bound.connect(besieged.rpc)
        bound.send(codec.encode(m.Hello(1, version=m.WIRE_VERSION, token=engine.attachment.reply.token)))
        assert isinstance(codec.decode_reply(bound.recv()), m.Welcome)
        thief.connect(besieged.rpc)
        thief.send(codec.encode(m.Lookup(2, keys=key("x"))))
        with pytest.raises(zmq.Again):
            thief.recv()
        bound.send(codec.encode(m.Lookup(3, keys=key("x"))))
        assert isinstance(codec.decode_reply(bound.recv()), m.Found)


CASCADE: dict[str, Callable[[int], Any]] = {
    "enlist": lambda id: m.Enlist(id, token=os.urandom(16)),
    "enlist without token": lambda id: m.Enlist(id, token=b""),
    "orders": lambda id: m.Orders(id, wait_s=0.0, write_bytes=1 << 40),
    "written": lambda id: m.Written(id, lease=OTHERS_ID, kept=True),
    "admit": lambda id: m.Admit(id, keys=key("planted"), world_size=1, extent_bytes=EXTENT_BYTES),
    "publish": lambda id: m.Publish(id, OTHERS_ID, bytes(40), EXTENT_BYTES, bytes(8), False),
    "promoted": lambda id: m.Promoted(id, promotion=OTHERS_ID, num_found=1, num_promoted=1),
}
SERVICE: dict[str, Callable[[int], Any]] = {
    "snapshot": m.Snapshot,
    "clear": m.Clear,
    "peek": lambda id: m.Peek(id, keys=key("x")),
    "tenants": m.Tenants,
    "limit": lambda id: m.Limit(id, "victim", 0.0),
}


@pytest.mark.parametrize("make", [*CASCADE.values(), *SERVICE.values()], ids=[*CASCADE, *SERVICE])
def test_what_only_the_servers_own_processes_may_say_is_refused_and_changes_nothing(
    besieged: Server, engines: Engines, make: Callable[[int], Any]
) -> None:
    engine = engines(besieged)
    names: list[object] = [("kept", os.urandom(8))]
    engine.store(names)
    lease = engine.lookup(names).lease
    before = state(besieged)
    with pytest.raises(PeerRefused) as caught:
        engine.call(make(0))
    assert caught.value.code == m.REFUSED_OWNER
    with Stranger(besieged.rpc_port) as stranger:
        stranger.send(frame(codec.encode(make(3))))
        reply = codec.decode_reply(stranger.read_message())
        assert isinstance(reply, m.Refused)
        assert reply.code in (m.REFUSED_UNKNOWN, m.REFUSED_OWNER)
    assert state(besieged) == before
    engine.call(m.Release(0, lease=lease))
    assert engine.lookup(names, lease=False).num_chunks == 1


def state(server: Server) -> Any:
    """What an intruder would change."""
    l1 = server.l1()
    counts = (l1["total_object_count"], l1["read_locked_count"], l1["write_locked_count"], l1["memory_used_bytes"])
    return (*counts, server.ask("/quota")[1], server.status()["attached_processes"])


def test_nobody_ends_or_uses_what_another_engine_was_given(besieged: Server, engines: Engines) -> None:
    owner, thief = engines(besieged), engines(besieged)
    held: list[object] = [("held", os.urandom(8))]
    new: list[object] = [("new", os.urandom(8))]
    owner.store(held)
    lease, granted = owner.lookup(held).lease, owner.reserve(new)
    checksums = owner.write(granted, new)
    ids = {lease, granted.ticket, lease + 1, lease - 1, granted.ticket + 1, 0, (1 << 63) - 1, OTHERS_ID}
    for number in ids:
        for request in (
            m.Release(0, lease=number),
            m.Release(0, lease=number, failed=bytes(4)),
            m.Commit(0, ticket=number, checksums=bytes(8)),
            m.Abort(0, ticket=number),
        ):
            with pytest.raises(PeerRefused) as caught:
                thief.call(request)
            assert caught.value.code == m.REFUSED_OWNER
    with pytest.raises(PeerRefused):
        owner.call(m.Release(0, lease=granted.ticket))
    assert owner.call(m.Commit(0, ticket=granted.ticket, checksums=checksums)).num_chunks == 1
    owner.call(m.Release(0, lease=lease))
    found = owner.lookup([*held, *new], lease=False)
    assert owner.verified(found, [*held, *new]) == [True, True]


def test_another_engines_promotion_can_neither_be_waited_for_nor_given_up(own: Server, engines: Engines) -> None:
    eventually(lambda: own.status()["storage_manager"]["l2_adapters"][0]["is_healthy"])
    owner, thief = engines(own), engines(own)
    keys = key(("in no tier", os.urandom(8)))
    for _ in range(50):
        reply = owner.call(m.Lookup(0, keys=keys, promote=True))
        if not isinstance(reply, m.Promoting):
            continue
        stolen = thief.call(m.Lookup(0, keys=keys, promote=True, promotion=reply.promotion))
        assert isinstance(stolen, m.Found)
        with pytest.raises(PeerRefused) as caught:
            thief.call(m.Release(0, lease=reply.promotion))
        assert caught.value.code == m.REFUSED_OWNER
        while isinstance(reply, m.Promoting):
            reply = owner.call(m.Lookup(0, keys=keys, promote=True, promotion=reply.promotion))
        return
    pytest.fail("no lookup was answered by a promotion")


def test_three_thousand_promotions_that_nobody_asks_about_again_end_by_themselves(
    own: Server, engines: Engines
) -> None:
    eventually(lambda: own.status()["storage_manager"]["l2_adapters"][0]["is_healthy"])
    engine = engines(own)

    def begin() -> m.Reply:
        return engine.call(m.Lookup(0, keys=os.urandom(32), promote=True))

    with watched(own):
        kinds = [type(begin()) for _ in range(3000)]
    assert set(kinds) == {m.Promoting, m.Found}
    assert kinds.count(m.Promoting) <= 1024 + kinds.index(m.Found)
    assert kinds[-1] is m.Found
    eventually(lambda: isinstance(begin(), m.Promoting), "those that were left are over")


def test_a_second_registration_replaces_the_first_and_never_mixes_with_it(besieged: Server, engines: Engines) -> None:
    engine, others = engines(besieged), engines(besieged)
    names: list[object] = [("of another's", os.urandom(8))]
    others.store(names)
    lease, other_lease = engine.lookup(names).lease, others.lookup(names).lease
    ticket = engine.reserve([("half", os.urandom(8))]).ticket
    engine.call(m.Register(0, "worker", "another model", "mock 1", 0, 1, 2 * EXTENT_BYTES))
    for request in (m.Release(0, lease=lease), m.Commit(0, ticket=ticket, checksums=bytes(8))):
        with pytest.raises(PeerRefused) as caught:
            engine.call(request)
        assert caught.value.code == m.REFUSED_OWNER
    others.call(m.Release(0, lease=other_lease))


def test_the_same_token_used_by_many_connections_serves_the_last_one_only(besieged: Server, engines: Engines) -> None:
    engine = engines(besieged)
    hello = frame(codec.encode(m.Hello(1, version=m.WIRE_VERSION, token=engine.attachment.reply.token)))
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(Stranger(besieged.rpc_port)) for _ in range(30)]
        for stranger in strangers:
            stranger.send(hello)
            assert isinstance(codec.decode_reply(stranger.read_message()), m.Welcome)
        for stranger in strangers:
            stranger.send(frame(codec.encode(m.Lookup(2, keys=key("x"), lease=False))))
        replies = [codec.decode_reply(stranger.read_message()) for stranger in strangers]
    assert [type(reply) for reply in replies] == [m.Refused] * 29 + [m.Found]


def test_wrong_guesses_of_tokens_bind_nobody_and_are_all_answered(besieged: Server) -> None:
    source = random.Random(11)
    with watched(besieged), Stranger(besieged.rpc_port) as stranger:
        for number in range(2000):
            token = source.randbytes(source.choice([0, 1, 15, 16, 17, 4096])) or b"\0"
            stranger.send(frame(codec.encode(m.Hello(number, version=m.WIRE_VERSION, token=token))))
            reply = codec.decode_reply(stranger.read_message())
            assert isinstance(reply, m.Refused)
            assert reply.code == m.REFUSED_UNKNOWN


def test_every_message_with_absurd_numbers_is_answered_and_breaks_nothing(besieged: Server, engines: Engines) -> None:
    engine, faults = engines(besieged), besieged.metric("faults_total")
    kinds = [kind for kind in m.Request.__args__ if kind not in (m.Bye, m.Hello)]
    source = random.Random(3)
    with watched(besieged), zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        dealer.connect(besieged.rpc)
        hello = codec.encode(m.Hello(1, version=m.WIRE_VERSION, token=engine.attachment.reply.token))
        for number in range(3000):
            kind = source.choice(kinds)
            fields = [absurd(field.type, source) for field in msgspec.structs.fields(kind)[1:]]
            dealer.send(hello)
            dealer.recv()
            dealer.send(VERSION + msgspec.msgpack.encode([kind.__struct_config__.tag, number, *fields]))
            assert codec.decode_reply(dealer.recv()).id == number
    assert besieged.metric("faults_total") == faults


def test_many_connections_that_come_and_go_leave_nothing(besieged: Server) -> None:
    def come_and_go() -> None:
        for _ in range(300):
            with contextlib.suppress(OSError), Stranger(besieged.rpc_port) as stranger:
                stranger.send(PING)

    before = len(os.listdir(f"/proc/{besieged.process.pid}/fd"))
    with watched(besieged):
        threads = [threading.Thread(target=come_and_go) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    eventually(lambda: len(os.listdir(f"/proc/{besieged.process.pid}/fd")) <= before + 4, "descriptors are closed")


def test_an_engine_that_asks_for_everything_leaves_the_others_their_share(besieged: Server, engines: Engines) -> None:
    greedy: Engine = engines(besieged)
    with watched(besieged):
        for round_ in range(20):
            names: list[object] = [("greedy", round_, number) for number in range(1000)]
            greedy.store(names)
            greedy.lookup(names)
    greedy.close()
    eventually(lambda: besieged.l1()["read_locked_count"] == 0, "what it leased is free")
