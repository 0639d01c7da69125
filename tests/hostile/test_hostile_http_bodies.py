"""Slow bodies of many: together they take bounded memory, and others are answered."""

from __future__ import annotations

import contextlib

from server_running import Server
from test_hostile_http_crowds import SLOW_BODY, crowd
from witness import watched


def test_a_crowd_with_slow_bodies_takes_bounded_memory_and_is_sent_away_in_time(besieged: Server) -> None:
    with watched(besieged, growth_mib=160), crowd(besieged, SLOW_BODY, 300) as connections:
        for connection in connections:
            connection.setblocking(False)
        for _ in range(10):
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.send(b"1," * 250_000)
            assert besieged.healthy()
