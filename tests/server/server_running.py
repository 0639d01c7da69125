"""A real server as a process, and a small engine that talks to it over the real wire."""

from __future__ import annotations

import contextlib
import http.client
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from array import array
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import msgspec

from lmcache.keys import checksum_seed, tenant_id
from lmcache.transfer import _native
from lmcache.wire import messages as m
from lmcache.wire.attach import Attachment, attach
from lmcache.wire.client import Client

WAIT_S = 30.0
EXTENT_BYTES = 64 << 10
POOL_GB = 0.0625


def free_ports() -> tuple[int, int]:
    """Two ports nobody listens on."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def eventually(holds: Callable[[], Any], what: str = "") -> Any:
    """The first true value of ``holds``, which is asked again and again for a generous time."""
    deadline = time.monotonic() + WAIT_S
    while not (value := holds()):
        assert time.monotonic() < deadline, f"never: {what or holds}"
        time.sleep(0.02)
    return value


def key(text: object) -> bytes:
    """A key of 32 bytes."""
    return sha256(repr(text).encode()).digest()


class Server:
    """One `lmcache server`."""

    def __init__(self, folder: str, *options: str, pool_gb: float = POOL_GB) -> None:
        self.folder = folder
        self.rpc_port, self.http_port = free_ports()
        self.attach_path = f"{folder}/{self.rpc_port}.sock"
        self.options = [f"--port={self.rpc_port}", f"--http-port={self.http_port}", f"--l1-size-gb={pool_gb}"]
        self.options += ["--attach-path", self.attach_path, *options]
        self.process: subprocess.Popen[bytes]
        self.log_path = f"{folder}/log"

    @property
    def rpc(self) -> str:
        return f"tcp://127.0.0.1:{self.rpc_port}"

    @property
    def local_path(self) -> str:
        """The socket of attached processes."""
        return f"{self.attach_path}.rpc"

    def way(self, name: str) -> str:
        """The endpoint of one way in: "local" or "tcp"."""
        return {"local": f"unix://{self.local_path}", "tcp": self.rpc}[name]

    @property
    def pool_folder(self) -> str:
        return f"/dev/shm/lmcache-{os.geteuid()}/{self.rpc_port}"

    def start(self) -> Server:
        """Start and wait until healthy."""
        with open(self.log_path, "ab") as log:
            command = [sys.executable, "-m", "lmcache.server", *self.options]
            environment = {**os.environ, "XDG_STATE_HOME": f"{self.folder}/state"}
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        eventually(lambda: self.healthy() or self.process.poll() is not None)
        assert self.process.poll() is None, self.log()
        return self

    def log(self) -> str:
        with open(self.log_path) as log:
            return log.read()

    def ask(self, path: str, body: bytes | None = None) -> tuple[int, Any]:
        """Status and JSON body (or text) of one HTTP request; status 0 when there is no answer."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", data=body)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            with error:
                status, text = error.code, error.read()
        except (OSError, http.client.HTTPException):
            return 0, None
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode()

    def healthy(self) -> bool:
        return self.ask("/healthcheck")[0] == 200

    def status(self) -> dict[str, Any]:
        code, status = self.ask("/status")
        assert code == 200, status
        assert isinstance(status, dict)
        return status

    def l1(self) -> dict[str, Any]:
        l1 = self.status()["storage_manager"]["l1_manager"]
        assert isinstance(l1, dict)
        return l1

    def metric(self, name: str) -> float:
        code, text = self.ask("/metrics")
        assert code == 200, text
        lines = [line for line in str(text).splitlines() if line.startswith(f"lmcache_mp_{name} ")]
        return float(lines[0].split()[1])

    def service_pid(self) -> int | None:
        with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as file:
            return next((int(pid) for pid in file.read().split()), None)
        return None

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(WAIT_S)

    def kill(self) -> None:
        """Kill the core (stopped or not)."""
        self.process.kill()
        self.process.wait(WAIT_S)


class Engine:
    """A mock engine: attaches, maps the pool, stores and retrieves bytes with the native copy engine."""

    def __init__(self, server: Server, *, rank: int = 0, world_size: int = 1, register: bool = True) -> None:
        ask = m.Attach(version=m.WIRE_VERSION, pid=os.getpid(), name=f"test worker {rank}", want_pool=True)
        self.attachment: Attachment = attach(server.attach_path, ask, WAIT_S)
        fd = self.attachment.pool_fd
        assert fd is not None
        self.rank = rank
        self.patience_s = WAIT_S
        self.pool = mmap.mmap(fd, self.attachment.reply.pool_bytes)
        self.client = Client(self.attachment.reply.endpoint)
        self.hello(self.attachment.reply.token)
        eventually(lambda: self.call(m.Ping(0)).ready_bytes, "L1 has memory")  # made while the server serves already
        if register:
            group = m.KernelGroup(
                num_layers=2, num_blocks=64, block_tokens=16, num_heads=4, head_size=8, dtype="torch.float16",
                is_mla=False, attention_backend="TEST", shape="NL", concrete_shape="2",
            )  # fmt: skip
            self.call(m.Register(0, "worker", "tiny", "mock 1", rank, world_size, EXTENT_BYTES, (rank,), (group,)))

    def hello(self, token: bytes) -> Any:
        return self.call(m.Hello(0, version=m.WIRE_VERSION, token=token))

    def call(self, request: m.Request) -> Any:
        return self.client.call(request, self.patience_s)

    def reserve(self, names: list[object], salt: str = "") -> m.Granted:
        tenant = tenant_id(salt, self.attachment.reply.tenant_secret)
        granted = self.call(m.Reserve(0, keys=b"".join(map(key, names)), tenant=tenant))
        assert isinstance(granted, m.Granted)
        return granted

    def write(self, granted: m.Granted, names: list[object]) -> bytes:
        """Fill the granted extents with bytes that depend on the name; the checksums."""
        checksums = array("Q")
        for name, offset in zip(names, array("Q", granted.offsets), strict=True):
            if offset != m.NO_EXTENT:
                data = contents(name)
                self.pool[offset : offset + EXTENT_BYTES] = data
                checksums.append(self.checksum(name, data))
        return checksums.tobytes()

    def store(self, names: list[object], salt: str = "") -> int:
        granted = self.reserve(names, salt)
        if not granted.ticket:
            return 0
        committed = self.call(m.Commit(0, ticket=granted.ticket, checksums=self.write(granted, names)))
        return int(committed.num_chunks)

    def lookup(self, names: list[object], *, lease: bool = True) -> m.Found:
        found = self.call(m.Lookup(0, keys=b"".join(map(key, names)), lease=lease))
        assert isinstance(found, m.Found)
        return found

    def verified(self, found: m.Found, names: list[object]) -> list[bool]:
        """Whether each found extent holds the bytes of its name, by content and by checksum."""
        pairs = zip(array("Q", found.offsets), array("Q", found.checksums), names, strict=False)
        results = []
        for offset, checksum, name in pairs:
            data = self.pool[offset : offset + EXTENT_BYTES]
            results.append(data == contents(name) and self.checksum(name, data) == checksum)
        return results

    def checksum(self, name: object, data: bytes) -> int:
        """As the connectors make it."""
        return int(_native.checksum(data, checksum_seed(key(name), self.rank)))

    def promote(self, names: list[object]) -> m.Found:
        """Look up as the connectors do: what L1 lacks is waited for."""
        request = m.Lookup(0, keys=b"".join(map(key, names)), promote=True)
        while isinstance(reply := self.call(request), m.Promoting):
            time.sleep(reply.retry_ms / 1000)
            request = msgspec.structs.replace(request, promotion=reply.promotion)
        assert isinstance(reply, m.Found)
        return reply

    def close(self) -> None:
        self.client.close()
        self.pool.close()
        self.attachment.close()


class Engines:
    """Makes engines that are closed after the test."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack

    def __call__(self, server: Server, **options: Any) -> Engine:
        engine = Engine(server, **options)
        self._stack.callback(engine.close)
        return engine


def contents(name: object) -> bytes:
    """The bytes that are stored under a name."""
    return key(("contents", name)) * (EXTENT_BYTES // 32)


@contextlib.contextmanager
def running(folder: str, *options: str, pool_gb: float = POOL_GB) -> Iterator[Server]:
    """A server that is gone at the end, whatever happened to it meanwhile."""
    server = Server(folder, *options, pool_gb=pool_gb).start()
    try:
        yield server
    finally:
        if server.process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.send_signal(signal.SIGCONT)
                server.stop()
            server.kill()
        for name in ("pool", "records"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{server.pool_folder}/{name}")
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(server.pool_folder)
