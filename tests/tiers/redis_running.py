"""Real Redis and Valkey servers as processes on loopback: alone, with TLS, or three as a cluster."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

WAIT_S = 30.0
SLOTS = 16384


def free_port() -> int:
    """A port of loopback nobody listens on; its cluster bus would be 10000 above."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port < 55000:
            return port


class RedisServer:
    """One server, not started yet. ``say`` sends it a command on a connection of its own."""

    def __init__(self, folder: Path, *options: str, program: str = "redis-server", port: int = 0) -> None:
        self.folder, self.options, self.program = folder, options, program
        self.port = port or free_port()
        self.tls = any("tls-port" in option for option in options)
        folder.mkdir(parents=True, exist_ok=True)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and return once it accepts connections."""
        listen = ["--port", "0", "--tls-port", str(self.port)] if self.tls else ["--port", str(self.port)]
        options = [option for option in self.options if option != "--tls-port"]
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(
                [self.program, *listen, "--bind", "127.0.0.1", "--save", "", "--dir", str(self.folder), *options],
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + WAIT_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), WAIT_S):
                return
            assert self.process.poll() is None, (self.folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.01)

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

    def say(self, *words: str | bytes) -> bytes:
        """The raw start of the reply (one line, and what came with it) to a command, without TLS or password."""
        parts = [word.encode() if isinstance(word, str) else word for word in words]
        request = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        with socket.create_connection(("127.0.0.1", self.port), WAIT_S) as link:
            link.sendall(request)
            reply = b""
            while not reply.endswith(b"\r\n"):
                got = link.recv(1 << 16)
                assert got, "the server closed the connection"
                reply += got
            return reply


@contextlib.contextmanager
def redis_server(folder: Path, *options: str, program: str = "redis-server") -> Iterator[RedisServer]:
    """One server; killed at the end, stopped or not."""
    server = RedisServer(folder, *options, program=program)
    try:
        server.start()
        yield server
    finally:
        server.kill()


def certificates(folder: Path) -> dict[str, str]:
    """A CA, and a certificate for 127.0.0.1 and localhost that server and client use, made by openssl: their paths."""
    paths = {name: str(folder / f"{name}.pem") for name in ("ca", "ca_key", "cert", "key", "request", "extensions")}
    Path(paths["extensions"]).write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    new_key = ["-newkey", "rsa:2048", "-nodes"]
    ca = ["-keyout", paths["ca_key"], "-out", paths["ca"], "-days", "2", "-subj", "/CN=test CA"]
    signing = ["-CA", paths["ca"], "-CAkey", paths["ca_key"], "-CAcreateserial", "-days", "2"]
    for command in (
        ["req", "-x509", *new_key, *ca],
        ["req", *new_key, "-keyout", paths["key"], "-out", paths["request"], "-subj", "/CN=localhost"],
        ["x509", "-req", "-in", paths["request"], *signing, "-out", paths["cert"], "-extfile", paths["extensions"]],
    ):
        subprocess.run(["openssl", *command], check=True, capture_output=True, timeout=WAIT_S)
    return paths


def tls_options(paths: dict[str, str]) -> list[str]:
    """What a server is told to speak TLS only, and to ask for a certificate."""
    files = ["--tls-cert-file", paths["cert"], "--tls-key-file", paths["key"], "--tls-ca-cert-file", paths["ca"]]
    return ["--tls-port", *files, "--tls-auth-clients", "yes"]


@contextlib.contextmanager
def redis_cluster(folder: Path) -> Iterator[list[RedisServer]]:
    """Three primaries, each with a third of the slots."""
    with contextlib.ExitStack() as stack:
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-config-file", "nodes.conf")
        options += ("--cluster-require-full-coverage", "no")
        servers = [stack.enter_context(redis_server(folder / f"node{index}", *options)) for index in range(3)]
        for index, server in enumerate(servers):
            first, last = index * SLOTS // 3, (index + 1) * SLOTS // 3 - 1
            assert server.say("CLUSTER", "ADDSLOTSRANGE", str(first), str(last)) == b"+OK\r\n"
            assert server.say("CLUSTER", "SET-CONFIG-EPOCH", str(index + 1)) == b"+OK\r\n"
            server.say("CLUSTER", "MEET", "127.0.0.1", str(servers[0].port))
        deadline = time.monotonic() + WAIT_S
        while not all(_knows_all(server, servers) for server in servers):
            assert time.monotonic() < deadline, "the cluster does not come together"
            time.sleep(0.05)
        yield servers


def _knows_all(server: RedisServer, servers: Sequence[RedisServer]) -> bool:
    state, slots = server.say("CLUSTER", "INFO"), server.say("CLUSTER", "SLOTS")
    return b"cluster_state:ok" in state and all(b":%d\r\n" % other.port in slots for other in servers)


def missing(*programs: str) -> str | None:
    """The first program that is not installed."""
    return next((program for program in programs if shutil.which(program) is None), None)


def options(server: RedisServer, **more: Any) -> dict[str, Any]:
    """What ``make_tier`` is told to use a server."""
    return {"type": "redis", "host": "127.0.0.1", "port": server.port, **more}


def name_of(key: bytes) -> str:
    """How an object's value is called in the store, if the tier has the default prefix."""
    return f"lmcache:1:{key.hex()}"


STOP, CONTINUE = signal.SIGSTOP, signal.SIGCONT
