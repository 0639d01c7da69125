"""A real HTTP server on a free loopback port that serves what a test hands it, and remembers what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One answer; ``pieces`` are sent one after another, without a length, until the connection closes."""

    status: int = 200
    body: bytes = b""
    pieces: tuple[bytes, ...] | None = None
    headers: dict[str, str] = field(default_factory=dict)


def json_answer(document: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(document).encode())


def event_stream(*events: dict[str, Any], done: bool = True) -> Answer:
    pieces = [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]
    return Answer(pieces=(*pieces, *([b"data: [DONE]\n\n"] if done else [])))


@dataclass(frozen=True)
class Asked:
    """One request that arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Server:
    """What is served where, and what was asked."""

    url: str
    answers: dict[str, Answer]
    asked: list[Asked] = field(default_factory=list)


@contextmanager
def serve(answers: dict[str, Answer]) -> Iterator[Server]:
    """Serve ``answers`` by path (`/status`) on a free port; any other path is a 404 as FastAPI words it."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    httpd.daemon_threads = True
    server = Server(f"http://127.0.0.1:{httpd.server_address[1]}", answers)
    httpd.lmcache_test = server  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        thread.join(timeout=10)
        httpd.server_close()


class _Handler(BaseHTTPRequestHandler):
    def handle_one_request(self) -> None:
        """As the base does it; a client that hangs up in the middle is an everyday event."""
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def _handle(self) -> None:
        server: Server = self.server.lmcache_test  # type: ignore[attr-defined]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.asked.append(Asked(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
        answer = server.answers.get(self.path, json_answer({"detail": "Not Found"}, 404))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if answer.pieces is None:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        for piece in (answer.body,) if answer.pieces is None else answer.pieces:
            self.wfile.write(piece)
            self.wfile.flush()
        self.close_connection = answer.pieces is not None

    do_GET: Callable[..., None] = _handle
    do_POST: Callable[..., None] = _handle
    do_PUT: Callable[..., None] = _handle
    do_DELETE: Callable[..., None] = _handle

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: stderr belongs to the command under test."""
