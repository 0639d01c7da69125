"""Whatever arrives, dies or hangs: the others are served and health tells the truth."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq
from server_running import EXTENT_BYTES, WAIT_S, Engines, Server, eventually, key, running

from lmcache.errors import PeerRefused
from lmcache.wire import codec
from lmcache.wire import messages as m


@contextlib.contextmanager
def raw(endpoint: str) -> Iterator[zmq.Socket[bytes]]:
    """A bare socket that may send anything."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, int(WAIT_S * 1000))
        dealer.connect(endpoint)
        yield dealer


VERSION = bytes([m.WIRE_VERSION])
GREETING = b"\xff" + b"\0" * 8 + b"\x7f\x03\x01NULL" + b"\0" * 48
READY = b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x06DEALER"
STARTS = [b"", b"\xff", GREETING[:10], GREETING[:10] + b"\x00", GREETING[:10] + b"\x01", GREETING, GREETING + READY]


@pytest.mark.parametrize("start", STARTS, ids=["raw", "ff", "signature", "zmtp1", "zmtp2", "greeting", "ready"])
def test_random_bytes_on_two_hundred_connections_hurt_nobody(shared: Server, engines: Engines, start: bytes) -> None:
    engine, source = engines(shared), random.Random(7)
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", shared.rpc_port), WAIT_S))
            with contextlib.suppress(OSError):
                connection.sendall(start + source.randbytes(4096))
        assert engine.store([("after the scan", start)]) == 1
        assert shared.healthy()
    assert engine.lookup([("after the scan", start)]).num_chunks == 1


def test_wrong_part_counts_and_frames_that_are_not_ours_hurt_nobody_but_their_sender(
    shared: Server, engines: Engines
) -> None:
    engine = engines(shared)
    before = shared.metric("malformed_total")
    with raw(shared.rpc) as dealer:
        for parts in (
            [b""],
            [b"", b""],
            [b"x"] * 50,
            [VERSION + b"\xc1"],
            [b"\xff" * 1000],
            [VERSION + b"\x91" * 50_000],
        ):
            dealer.send_multipart(parts)
        dealer.send(codec.encode(m.Ping(1)))
        assert codec.decode_reply(dealer.recv()) == m.Pong(1, ready_bytes=engine.call(m.Ping(0)).ready_bytes)
        assert shared.metric("malformed_total") == before + 6
        assert shared.healthy()


def test_a_malformed_request_is_answered_when_its_id_can_be_read(shared: Server) -> None:
    with raw(shared.rpc) as dealer:
        dealer.send(VERSION + b"\x93\xa6lookup\x2a\x07")
        reply = codec.decode_reply(dealer.recv())
        assert isinstance(reply, m.Refused)
        assert (reply.id, reply.code) == (42, m.REFUSED_INVALID)


def test_a_malformed_frame_costs_its_sender_the_binding_until_it_says_hello_again(
    shared: Server, engines: Engines
) -> None:
    engine = engines(shared)
    assert engine.client._line.send(VERSION + b"nonsense")
    with pytest.raises(PeerRefused) as caught:
        engine.lookup(["x"])
    assert caught.value.code == m.REFUSED_UNKNOWN
    engine.hello(engine.attachment.reply.token)
    engine.lookup(["x"])


def test_a_giant_frame_costs_its_sender_the_connection_and_nobody_memory(shared: Server, engines: Engines) -> None:
    engine = engines(shared)
    with raw(shared.rpc) as dealer:
        dealer.send(VERSION * (64 << 20))
        assert isinstance(engine.call(m.Ping(0)), m.Pong)
        assert shared.healthy()
        with open(f"/proc/{shared.process.pid}/status") as status:
            peak_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
        assert peak_kib < 64 << 10


def test_a_client_that_never_reads_tcp_is_given_up_and_the_others_are_served(shared: Server, engines: Engines) -> None:
    engine, deaf = engines(shared), engines(shared)
    names: list[object] = [("deaf", i) for i in range(200)]
    engine.store(names)
    before = shared.metric("unsent_total")
    hello = codec.encode(m.Hello(1, version=m.WIRE_VERSION, token=deaf.attachment.reply.token))
    frame = codec.encode(m.Lookup(2, keys=b"".join(map(key, names)), lease=False))
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVHWM, 1)
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.connect(shared.rpc)
        dealer.send(hello)
        for _ in range(5_000):
            dealer.send(frame)
        eventually(lambda: shared.metric("unsent_total") > before)
        assert engine.lookup(names).num_chunks == 200
        assert shared.healthy()


def test_who_connects_to_the_attach_socket_and_says_nothing_is_dropped(shared: Server, engines: Engines) -> None:
    with socket.socket(socket.AF_UNIX) as silent, socket.socket(socket.AF_UNIX) as babbler:
        silent.connect(shared.attach_path)
        babbler.connect(shared.attach_path)
        babbler.sendall(b"\xff\xff\xff\xff" + b"x" * 5000)
        engines(shared).lookup(["x"])
        for connection in (silent, babbler):
            connection.settimeout(WAIT_S)
            with contextlib.suppress(ConnectionResetError):
                while connection.recv(4096):
                    pass


def test_an_attached_process_that_talks_on_is_taken_for_dead(own: Server, engines: Engines) -> None:
    engine = engines(own)
    engine.attachment.socket.send(b"more")
    eventually(lambda: own.status()["attached_processes"] == 0)


def test_a_stopped_core_is_unhealthy_and_healthy_again_when_it_goes_on(own: Server) -> None:
    own.process.send_signal(signal.SIGSTOP)
    eventually(lambda: own.ask("/healthcheck")[0] == 503)
    code, health = own.ask("/healthcheck")
    assert code == 503
    assert health["status"] == "unhealthy"
    assert "no answer from the core" in health["reason"]
    assert own.ask("/status")[0] == 503
    own.process.send_signal(signal.SIGCONT)
    eventually(own.healthy)


def test_a_killed_service_comes_back_and_the_core_keeps_what_it_holds(own: Server, engines: Engines) -> None:
    engine = engines(own)
    engine.store(["kept"])
    before = own.service_pid()
    assert before is not None
    os.kill(before, signal.SIGKILL)
    assert engine.lookup(["kept"]).num_chunks == 1
    eventually(lambda: own.service_pid() not in (None, before))
    eventually(own.healthy)
    assert own.metric("service_restarts_total") == 1


def test_the_service_ends_with_a_killed_core(own: Server) -> None:
    service = own.service_pid()
    own.kill()
    eventually(lambda: not os.path.exists(f"/proc/{service}") or is_zombie(service))


def is_zombie(pid: int | None) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "Z"
    return True


def test_after_kill_nine_the_next_start_finds_what_was_committed_again(own: Server, engines: Engines) -> None:
    first = engines(own)
    names: list[object] = [("adopted", i) for i in range(5)]
    first.store(names)
    half = first.reserve(["half written"])
    assert half.ticket
    own.kill()
    own.start()
    second = engines(own)
    found = second.lookup([*names, "half written"])
    assert found.num_chunks == 5
    assert second.verified(found, names) == [True] * 5
    assert not first.attachment.alive()
    assert own.metric("adopted_chunks_total") == 5


@pytest.mark.parametrize("persist", [False, True])
def test_a_clean_stop_leaves_nothing_behind_unless_told_to_persist(
    tmp_path: Path, engines: Engines, persist: bool
) -> None:
    with running(str(tmp_path), *(["--l1-persist"] if persist else [])) as server:
        service = server.service_pid()
        engines(server).store(["x"])
        assert server.stop() == 0
        kept = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
        assert sorted(path.name for path in kept) == ["log", "tenant.key"]  # the latter is what its name says it is
        assert os.path.exists(server.pool_folder) == persist
        assert not os.path.exists(f"/proc/{service}")
        if persist:
            server.start()
            assert engines(server).lookup(["x"]).num_chunks == 1


def test_a_full_pool_says_so_and_evicts_what_nobody_holds(own: Server, engines: Engines) -> None:
    engine = engines(own)
    num_extents = own.l1()["memory_total_bytes"] // EXTENT_BYTES
    leased = [("leased", i) for i in range(num_extents // 4)]
    engine.store(list(leased))
    lease = engine.lookup(list(leased)).lease
    for start in range(3):
        engine.store([("more", start, i) for i in range(num_extents // 2)])
    assert own.metric("evicted_chunks_total") > 0
    found = engine.lookup(list(leased), lease=False)
    assert engine.verified(found, list(leased)) == [True] * len(leased)
    granted = engine.reserve([("too much", i) for i in range(num_extents)])
    assert m.FULL in granted.states
    assert granted.states.count(m.GRANTED) <= num_extents - len(leased)
    engine.call(m.Abort(0, ticket=granted.ticket))
    engine.call(m.Release(0, lease=lease))
