"""The HTTP API: whatever is sent, however slowly and by however many, `/healthcheck` answers others meanwhile."""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time

import pytest
from server_running import WAIT_S, Server
from witness import watched


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.http_port), WAIT_S)


def answer(server: Server, data: bytes) -> bytes:
    """All that comes back to these bytes until the server hangs up, or has nothing more to say."""
    with connect(server) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        said = b""
        with contextlib.suppress(OSError):
            while part := connection.recv(1 << 16):
                said += part
        return said


TRASH = {
    "not http": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 500,
    "no version": b"GET /\r\n\r\n",
    "http 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two lengths": b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "negative length": b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    "length and chunks": b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
    "chunk of 2**64": b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"fffffffffffffffff\r\nx",
    "no chunk": b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "odd coding": b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "nul": b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "folded": b"GET / HTTP/1.1\r\nHost: localhost\r\n folded: yes\r\n\r\n",
    "long line": b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many headers": b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    + b"".join(b"a%d: b\r\n" % n for n in range(20_000))
    + b"\r\n",
    "upgrade": b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    "bad utf-8 in path": b"GET /quota/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "dots": b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("data", TRASH.values(), ids=TRASH)
def test_what_is_not_http_is_an_error_of_its_sender(besieged: Server, data: bytes) -> None:
    with watched(besieged):
        for _ in range(20):
            said = answer(besieged, data)
            assert b" 500 " not in said.split(b"\r\n")[0]


def test_random_bytes_and_mutated_requests_hurt_nobody(besieged: Server) -> None:
    source = random.Random(23)
    whole = b'POST /cache/lookup HTTP/1.1\r\nHost: localhost\r\nContent-Length: 17\r\n\r\n{"token_ids":[1]}'
    with watched(besieged):
        for _ in range(300):
            data = bytearray(whole)
            for _ in range(source.randrange(1, 8)):
                data[source.randrange(len(data))] = source.randrange(256)
            assert not answer(besieged, bytes(data)).startswith(b"HTTP/1.1 500")
            answer(besieged, source.randbytes(300))


def test_thousands_of_pipelined_requests_of_one_who_does_not_read_stop_nobody(besieged: Server) -> None:
    with watched(besieged), connect(besieged) as connection:
        connection.settimeout(0.5)
        with contextlib.suppress(OSError):
            for _ in range(50):
                connection.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        assert besieged.healthy()


BODIES = {
    "deep": b"[" * 60_000,
    "deep object": b'{"a":' * 12_000,
    "huge number": b'{"token_ids":[' + b"9" * 60_000 + b"]}",
    "huge exponent": b'{"token_ids":[1e999999]}',
    "nan": b'{"token_ids":[NaN]}',
    "surrogates": b'{"token_ids":[1],"cache_salt":"\\ud800"}',
    "null": b"null",
    "not utf-8": b'{"token_ids":[1],"cache_salt":"\xff\xfe"}',
    "same key twice": b'{"token_ids":[1],"token_ids":"x"}',
}


@pytest.mark.parametrize("path", ["/cache/lookup", "/cache/clear"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_make_no_sense_are_answered_with_4xx(besieged: Server, path: str, body: bytes) -> None:
    with watched(besieged):
        connection = http.client.HTTPConnection("127.0.0.1", besieged.http_port, timeout=WAIT_S)
        connection.request("POST", path, body)
        response = connection.getresponse()
        text = response.read()
        connection.close()
    assert 200 <= response.status < 500, text
    assert json.loads(text)


def test_a_body_that_is_too_long_is_refused_before_it_has_come(besieged: Server) -> None:
    with watched(besieged), connect(besieged) as connection:
        connection.sendall(b"POST /cache/clear HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\n")
        connection.sendall(b"x" * 100_000)
        assert b" 413 " in connection.recv(4096)


def test_tokens_by_the_million_are_answered_while_others_are(besieged: Server) -> None:
    body = json.dumps({"token_ids": [1] * 2_000_000}).encode()
    with watched(besieged, growth_mib=400):
        for _ in range(3):
            started = time.monotonic()
            status, _ = besieged.ask("/cache/lookup", body)
            assert status in (200, 422)
            assert time.monotonic() - started < WAIT_S
