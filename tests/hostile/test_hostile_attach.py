"""The attach socket: slow, half, giant and unwelcome; and a death in every state of an attachment."""

from __future__ import annotations

import array
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from server_running import WAIT_S, Engines, Server, eventually
from witness import watched

from lmcache.wire import framing
from lmcache.wire import messages as m

ASK = framing.pack(m.Attach(version=m.WIRE_VERSION, pid=1, name="hostile", want_pool=True))
STATES = ("connected", "half", "asked", "attached", "greeted", "registered", "reserved", "leased", "promoting", "deaf")


def visit(server: Server, data: bytes = b"") -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(server.attach_path)
    except OSError:
        connection.close()
        raise
    connection.settimeout(WAIT_S)
    with contextlib.suppress(OSError):
        connection.sendall(data)
    return connection


def is_hung_up(connection: socket.socket) -> bool:
    with contextlib.suppress(ConnectionResetError):
        while connection.recv(4096):
            pass
    return True


def num_fds(server: Server) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def test_a_frame_that_is_cut_anywhere_or_trickles_in_is_dropped_in_time(besieged: Server) -> None:
    before = num_fds(besieged)
    with watched(besieged):
        visitors = [visit(besieged, ASK[:cut]) for cut in range(len(ASK))]
        for place in range(len(ASK) - 1):  # one byte at a time never gets there: the limit is on the whole
            with contextlib.suppress(OSError):
                visitors[0].sendall(ASK[place : place + 1])
            time.sleep(2.5 / len(ASK))
        for visitor in visitors:
            assert is_hung_up(visitor)
            visitor.close()
    eventually(lambda: num_fds(besieged) <= before, "descriptors are closed")


FRAMES = {
    "4 GiB announced": b"\xff\xff\xff\xff" + b"x" * 4096,
    "too long by one": (4097).to_bytes(4, "little") + b"x" * 4097,
    "nothing": bytes(4),
    "two": ASK + ASK,
    "more behind": ASK + b"x",
    "deep": (4096).to_bytes(4, "little") + b"\x91" * 4096,
    "huge array": (9).to_bytes(4, "little") + b"\xdd\xff\xff\xff\xff\xff\xff\xff\xff",
    "another message": framing.pack(m.AttachRefused(code="x", message="y")),
    "an endless name": framing.pack(m.Attach(version=m.WIRE_VERSION, pid=1, name="x" * 4050, want_pool=False)),
    "numbers": framing.pack(m.Attach(version=1 << 63, pid=-(1 << 63), name="\0\n\x1b[2J", want_pool=True)),
}


@pytest.mark.parametrize("data", FRAMES.values(), ids=FRAMES)
def test_frames_that_are_not_ours_cost_their_sender_the_connection(besieged: Server, data: bytes) -> None:
    with watched(besieged):
        for _ in range(50):
            with visit(besieged, data) as visitor:
                visitor.shutdown(socket.SHUT_WR)
                assert is_hung_up(visitor)


def test_random_frames_hurt_nobody(besieged: Server) -> None:
    source = random.Random(17)
    with watched(besieged):
        for _ in range(1000):
            data = bytearray(ASK)
            for _ in range(source.randrange(1, 6)):
                data[source.randrange(len(data))] = source.randrange(256)
            with visit(besieged, bytes(data)[: source.randrange(1, len(data) + 1)]):
                pass
    eventually(lambda: besieged.status()["attached_processes"] == 0, "who came is gone")


def test_descriptors_that_are_sent_to_the_server_are_closed_not_kept(besieged: Server) -> None:
    before = num_fds(besieged)
    reader, writer = os.pipe()
    with watched(besieged), contextlib.ExitStack() as stack:
        for data in (b"x", ASK, ASK[:3]):
            visitor = stack.enter_context(visit(besieged))
            for _ in range(20 if data == b"x" else 1):
                fds = array.array("i", [writer] * 100)
                with contextlib.suppress(OSError):
                    visitor.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
        os.close(writer)
        with open(reader, "rb") as pipe:
            assert (
                pipe.read() == b""
            )  # ends only when nobody has the other end, the server and its socket's queue neither
    eventually(lambda: num_fds(besieged) <= before, "descriptors are closed")


def test_fifteen_hundred_visitors_are_told_that_it_is_full_and_engines_get_in_afterwards(
    besieged: Server, engines: Engines
) -> None:
    refused = besieged.metric("attach_refusals_total")
    with watched(besieged, growth_mib=128), contextlib.ExitStack() as stack:
        for _ in range(1500):
            try:
                stack.enter_context(visit(besieged))
            except OSError:
                break  # our own limit on descriptors
        eventually(lambda: num_fds(besieged) < 1000, "who says nothing is dropped")
    assert engines(besieged).store([("after the crowd", os.getpid())]) == 1
    assert besieged.metric("attach_refusals_total") >= refused


def test_a_thousand_attached_processes_are_the_limit_and_all_their_things_are_freed(own: Server) -> None:
    with watched(own, growth_mib=128), contextlib.ExitStack() as stack:
        answers = []
        for _ in range(1100):
            visitor = stack.enter_context(visit(own, framing.pack(ask(want_pool=False))))
            answers.append(visitor.recv(4096)[5:25])
        assert any(b"attach_refused" in answer for answer in answers)
        assert sum(b"attached" in answer for answer in answers) > 500
    eventually(lambda: own.status()["attached_processes"] == 0, "all are gone")


def ask(want_pool: bool) -> m.Attach:
    return m.Attach(version=m.WIRE_VERSION, pid=1, name="crowd", want_pool=want_pool)


@pytest.mark.parametrize("state", STATES)
def test_a_death_in_any_state_frees_everything_that_was_held(own: Server, state: str) -> None:
    script = Path(__file__).parent / "dying.py"
    with watched(own):
        before = num_fds(own)
        children = []
        for _ in range(4):
            command = [sys.executable, str(script), own.attach_path, state]
            child = subprocess.Popen(command, stdout=subprocess.PIPE)
            assert child.stdout is not None
            assert child.stdout.readline() == b"now\n"
            children.append(child)
        for child in children:
            child.send_signal(signal.SIGKILL)
            child.communicate()
        eventually(lambda: num_fds(own) <= before, "descriptors are closed")
        eventually(lambda: own.status()["attached_processes"] == 1, "only the witness is attached")
    eventually(lambda: num_in_tier(own) == own.l1()["total_object_count"], "no chunk is being written to the tier")
    l1 = own.l1()
    assert (l1["read_locked_count"], l1["write_locked_count"]) == (0, 0)


def num_in_tier(server: Server) -> int:
    (adapter,) = server.status()["storage_manager"]["l2_adapters"]
    return int(adapter["stored_object_count"])
