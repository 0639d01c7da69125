"""A real S3 server as a process on loopback: moto's, standalone."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WAIT_S = 60.0
BUCKET = "kv-cache"
SIGNED = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=a"
HEADERS = {"Authorization": SIGNED, "Content-Type": "application/octet-stream"}


class S3Server:
    """One server, not started yet; it forgets everything when it ends."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def start(self, bucket: str = BUCKET) -> None:
        """Start it, and make the bucket."""
        with open(self.folder / "server.log", "ab") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError):
                self.request("PUT", f"/{bucket}")
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.05)

    def request(self, method: str, path: str, body: bytes | None = None) -> bytes:
        """An HTTP request of ours; moto wants a signature and does not check it."""
        request = urllib.request.Request(self.url + path, method=method, data=body, headers=HEADERS)
        with urllib.request.urlopen(request, timeout=WAIT_S) as reply:
            answer: bytes = reply.read()
        return answer

    def signal(self, number: int) -> None:
        """Send a signal to its process."""
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)
            self.process = None


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[S3Server]:
    """One server; killed at the end, stopped or not."""
    server = S3Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def options(server: S3Server, folder: Path, **more: Any) -> dict[str, Any]:
    """What ``make_tier`` is told to use a server."""
    secret = folder / "secret"
    secret.write_text("nobody checks it\n")
    return {
        "type": "object",
        "url": f"s3://{BUCKET}/some/prefix",
        "endpoint": server.url,
        "allow_http": True,
        "access_key_id": "tester",
        "secret_access_key_file": str(secret),
        **more,
    }
