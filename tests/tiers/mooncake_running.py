"""A real Mooncake Store for the tests: its master, and nodes that lend memory, each a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from stopping import stop

HANG_S = 60.0
NODE = """
import os, sys
os.environ["MC_LOG_LEVEL"] = "ERROR"
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
code = store.setup(
    {
        "local_hostname": "127.0.0.1",
        "metadata_server": "P2PHANDSHAKE",
        "global_segment_size": sys.argv[2],
        "local_buffer_size": str(16 << 20),
        "protocol": "tcp",
        "rdma_devices": "",
        "master_server_addr": sys.argv[1],
    }
)
print("node", code, flush=True)
sys.stdin.read()
"""


class Master:
    """``mooncake_master`` on loopback; may be stopped, killed and started again on its ports."""

    def __init__(self, folder: Path) -> None:
        self._log = folder / "mooncake_master.log"
        self._ports = free_ports(2)
        self.address = f"127.0.0.1:{self._ports[0]}"
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        spec = importlib.util.find_spec("mooncake")  # not an import: the library reads its settings when it is loaded
        assert spec is not None
        assert spec.origin is not None
        command = [
            str(Path(spec.origin).parent / "mooncake_master"),
            "--rpc_address=127.0.0.1",
            f"--rpc_port={self._ports[0]}",
            "--metrics_host=127.0.0.1",
            f"--metrics_port={self._ports[1]}",
            "--logtostderr",
        ]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        wait_for_port(self._ports[0], self.process)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def pause(self) -> None:
        """SIGSTOP."""
        assert self.process is not None
        stop(self.process.pid)

    def resume(self) -> None:
        """SIGCONT."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def master(folder: Path) -> Iterator[Master]:
    """A master that ends with the block."""
    running = Master(folder)
    try:
        yield running
    finally:
        running.kill()


@contextlib.contextmanager
def node(address: str, segment_bytes: int = 1 << 30) -> Iterator[subprocess.Popen[str]]:
    """A process that lends memory to the store whose master is at ``address``."""
    command = [sys.executable, "-c", NODE, address, str(segment_bytes)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "node 0\n"
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listened on a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until somebody listens there."""
    deadline = time.monotonic() + HANG_S
    while True:
        assert process.poll() is None, "the process ended before it listened"
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "nobody listens"
            time.sleep(0.02)
