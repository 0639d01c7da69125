"""`lmcache engine` as a process, and the little HTTP that its tests need."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

from server_running import WAIT_S, eventually, free_ports


class Engine:
    """An engine on a free port, its log in ``folder``; without a server unless ``lmcache`` names one."""

    def __init__(self, folder: Path, lmcache: str = "none", *options: str) -> None:
        self.port = free_ports()[0]
        self.log = folder / f"engine-{self.port}.log"
        command = [sys.executable, "-m", "lmcache_cli", "engine", "--port", str(self.port), "--lmcache", lmcache]
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen([*command, *options], stdout=sink, stderr=sink)
        eventually(lambda: self.process.poll() is not None or self.healthy())
        assert self.process.poll() is None, self.log.read_text()

    def healthy(self) -> bool:
        """GET /health."""
        try:
            return self.call("GET", "/health")[0] == 200
        except OSError:
            return False

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and document (or text)."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_S)
        try:
            data = body if isinstance(body, bytes) or body is None else json.dumps(body)
            connection.request(method, path, data, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read().decode()
        finally:
            connection.close()
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, text

    def complete(self, prompt: Any, **fields: Any) -> dict[str, Any]:
        """A greedy completion that must succeed."""
        status, document = self.call("POST", "/v1/completions", {"prompt": prompt, "temperature": 0, **fields})
        assert status == 200, document
        return dict(document)

    def answer(self, prompt: Any, **fields: Any) -> tuple[int, str]:
        """Cached tokens and text of a greedy completion."""
        document = self.complete(prompt, ignore_eos=True, **fields)
        return document["usage"]["prompt_tokens_details"]["cached_tokens"], document["choices"][0]["text"]

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which must end as it should."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        status, text = self.call("POST", path, body)
        assert status == 200, text
        *events, done, rest = text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def begin(self, **fields: Any) -> socket.socket:
        """Send a request for a completion and read nothing of its answer."""
        body = json.dumps({"prompt": "x", "temperature": 0, "ignore_eos": True, **fields}).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S)
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def metric(self, name: str) -> float:
        """One sample of /metrics, named with its labels."""
        text = self.call("GET", "/metrics")[1]
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(f"lmcache_engine_{name} ")))

    def ended(self, outcome: str) -> float:
        """Requests that have ended so."""
        return self.metric(f'requests_total{{outcome="{outcome}"}}')

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.stop()
        finally:
            self.process.kill()
            self.process.wait(WAIT_S)
