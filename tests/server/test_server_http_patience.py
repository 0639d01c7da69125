"""Clients of HTTP that are slow, silent or gone: they end, others are served, and the log stays short."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Iterator

import pytest
from fastapi import FastAPI, Request
from server_running import WAIT_S, Server, eventually

from lmcache.server.http import patience, serving

HALF_BODY = b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nabc"
HALVES = {
    "nothing": b"",
    "half a head": b"GET /heal",
    "half a body": HALF_BODY,
    "half a second request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\nGET / HT",
}


@pytest.fixture
def many_files() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096) if hard != resource.RLIM_INFINITY else 4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("many_files")
def test_a_thousand_slow_connections_do_not_keep_others_from_being_answered(own: Server) -> None:
    with contextlib.ExitStack() as stack:
        slow = []
        for number in range(1500):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", own.http_port), WAIT_S))
            with contextlib.suppress(OSError):  # it may have been ended already
                connection.sendall(list(HALVES.values())[number % 3])
            slow.append(connection)
            assert number % 100 or own.ask("/healthcheck")[0] == 200
        assert own.ask("/status")[0] == 200
        assert sum(map(is_over, slow[:500])) > 400
    assert own.log().count("Traceback") == 0


def is_over(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1000) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


@pytest.mark.parametrize("half", HALVES.values(), ids=HALVES)
def test_a_request_that_does_not_come_as_a_whole_ends_its_connection(
    monkeypatch: pytest.MonkeyPatch, half: bytes
) -> None:
    monkeypatch.setattr(patience, "REQUEST_S", 0.5)
    app = FastAPI()

    @app.get("/")
    async def root() -> str:
        return "here"

    @app.post("/cache/clear")
    async def body(request: Request) -> int:
        with contextlib.suppress(Exception):
            return len(await request.body())
        return 0

    async def converse() -> tuple[bytes, bytes]:
        server = serving.build_server(app)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
            running = asyncio.create_task(server.serve(sockets=[listener]))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(half)
            slow = await asyncio.wait_for(read_out(reader), WAIT_S)
            writer.close()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            prompt = await asyncio.wait_for(read_out(reader), WAIT_S)
            writer.close()
            server.stop()
            await asyncio.wait_for(running, WAIT_S)
            return slow, prompt

    slow, prompt = asyncio.run(converse())
    assert slow.count(b"HTTP/1.1 200") == half.count(b"GET / HTTP/1.1")
    assert prompt.startswith(b"HTTP/1.1 200")


async def read_out(reader: asyncio.StreamReader) -> bytes:
    said = b""
    with contextlib.suppress(ConnectionError):
        while part := await reader.read(1000):
            said += part
    return said


def test_who_leaves_in_the_middle_or_talks_nonsense_leaves_no_trace_in_the_log(own: Server) -> None:
    before = own.log()
    for data in (HALF_BODY, b"GET / HT\xff\r\n\r\n", b"\x16\x03\x01 not http\r\n\r\n"):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", own.http_port), WAIT_S) as connection:
                connection.sendall(data)
    assert own.ask("/status")[0] == 200
    own.ask("/cache/clear", b"")
    eventually(lambda: "cleared" in own.log())
    new = own.log().removeprefix(before).splitlines()
    assert [line for line in new if "ERROR" in line or "WARNING" in line or "Traceback" in line] == []
