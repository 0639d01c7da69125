"""Crowds at the HTTP API that do not get on: they make room for others, in time and without filling memory."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest
from server_running import WAIT_S, Server, eventually
from witness import watched

CROWD = 1500
SLOW_BODY = b"POST /cache/lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: 15000000\r\n\r\n[1,"
STARTS = {
    "nothing": b"",
    "half a line": b"GET /heal",
    "half the headers": b"GET /healthcheck HTTP/1.1\r\nHost: localhost\r\nX-a: ",
    "after one answer": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT",
}


@contextlib.contextmanager
def crowd(server: Server, data: bytes, size: int = CROWD) -> Iterator[list[socket.socket]]:
    """So many connections that have said this and stay."""
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(size):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", server.http_port), WAIT_S))
            with contextlib.suppress(OSError):
                connection.sendall(data)
            connections.append(connection)
        yield connections


@pytest.mark.parametrize("data", STARTS.values(), ids=STARTS)
def test_a_crowd_that_does_not_get_on_with_its_requests_keeps_nobody_out(besieged: Server, data: bytes) -> None:
    with watched(besieged), crowd(besieged, data):
        for _ in range(20):
            assert besieged.healthy()


def test_who_leaves_in_the_middle_of_a_body_leaves_no_traceback_in_the_log(besieged: Server) -> None:
    before = len(besieged.log())
    with crowd(besieged, SLOW_BODY, 20):
        pass
    eventually(besieged.healthy)
    assert "Traceback" not in besieged.log()[before:]
