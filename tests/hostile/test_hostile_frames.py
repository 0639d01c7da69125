"""Messages that have no end, and halves of frames: what zmq keeps of them is bounded, and who sends them leaves."""

from __future__ import annotations

import contextlib

from server_running import Server, eventually
from witness import watched
from zmtp import LONG, MORE, Stranger, frame

from lmcache.errors import PeerSilent
from lmcache.wire.client import Client
from lmcache.wire.messages import WIRE_VERSION, Hello, Welcome

GROWTH_MIB = 1024  # 128 MiB, and what comes by loopback in a tenth of a second, longer on a busy machine
FLOOD_MIB = 4096


def test_a_message_without_an_end_is_not_kept_without_a_limit(besieged: Server) -> None:
    before = besieged.metric("reopened_doors_total")
    part = frame(b"x" * (1 << 20), MORE)
    with watched(besieged, growth_mib=GROWTH_MIB), Stranger(besieged.rpc_port) as endless:
        endless.socket.settimeout(5.0)
        with contextlib.suppress(OSError):
            for _ in range(FLOOD_MIB):
                endless.send(part)
        assert endless.is_hung_up()
    assert besieged.metric("reopened_doors_total") > before


def test_halves_of_frames_on_many_connections_do_not_add_up(besieged: Server) -> None:
    half = bytes([LONG]) + (1 << 20).to_bytes(8, "big") + b"x" * ((1 << 20) - 1)
    with watched(besieged, growth_mib=GROWTH_MIB), contextlib.ExitStack() as stack:
        for _ in range(FLOOD_MIB // 2):
            try:
                stranger = stack.enter_context(Stranger(besieged.rpc_port))
                stranger.send(half)
            except OSError:
                break
    eventually(besieged.healthy)


def test_who_asks_where_to_attach_is_answered_after_the_door_was_made_anew(besieged: Server) -> None:
    before = besieged.metric("reopened_doors_total")
    with Client(f"tcp://127.0.0.1:{besieged.rpc_port}") as greeter, Stranger(besieged.rpc_port) as endless:
        assert isinstance(greeter.call(Hello(0, version=WIRE_VERSION), 10.0), Welcome)
        with contextlib.suppress(OSError):
            for _ in range(FLOOD_MIB):
                endless.send(frame(b"x" * (1 << 20), MORE))
        eventually(lambda: _is_welcome(greeter))  # a greeting that met the end of its connection is lost
    assert besieged.metric("reopened_doors_total") > before


def _is_welcome(greeter: Client) -> bool:
    with contextlib.suppress(PeerSilent):
        return isinstance(greeter.call(Hello(0, version=WIRE_VERSION), 1.0), Welcome)
    return False
