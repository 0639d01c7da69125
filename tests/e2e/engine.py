"""Stock vLLM and the real server as a test holds them: processes with a handle."""

from __future__ import annotations

import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DRIVER = Path(__file__).with_name("driver.py")
START_S = 180
ANSWER_S = 180


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """``lmcache server`` on free ports of the loopback, with logs in ``folder``."""

    def __init__(self, folder: Path, l1_gb: float = 0.5, *options: str, port: int | None = None) -> None:
        self.port, self.http_port = port or free_port(), free_port()
        self._log = folder / f"server-{self.port}.log"
        self._options = ["--l1-size-gb", str(l1_gb), *options]
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        """Start (again, on the same ports) and wait until it is healthy."""
        command = [sys.executable, "-m", "lmcache.server", "--port", str(self.port), "--http-port", str(self.http_port)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([*command, *self._options], stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended: {self._log.read_text()}")
            try:
                self.get("/healthcheck")
                return self.process
            except OSError:
                time.sleep(0.05)
        raise TimeoutError(self._log.read_text())

    def get(self, path: str) -> bytes:
        """Body of a GET."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=5) as reply:
            return bytes(reply.read())

    def status(self) -> dict[str, Any]:
        """GET /status."""
        return dict(json.loads(self.get("/status")))

    def counter(self, name: str) -> float:
        """Value of one Prometheus sample."""
        for line in self.get("/metrics").decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
        raise KeyError(name)

    def flip_bytes(self, every_bytes: int, first_bytes: int) -> None:
        """Bit rot in L1: of each ``every_bytes`` of the pool, invert the first ``first_bytes`` where it holds
        anything."""
        descriptors = Path(f"/proc/{self.process.pid}/fd")
        pool = next(fd for fd in descriptors.iterdir() if os.readlink(fd).endswith("/pool"))
        used = self.status()["storage_manager"]["l1_manager"]["memory_total_bytes"]
        with pool.open("r+b", buffering=0) as file:
            for start in range(0, used, every_bytes):
                before = os.pread(file.fileno(), first_bytes, start)
                if any(before):
                    os.pwrite(file.fileno(), bytes(byte ^ 0xFF for byte in before), start)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait(30)

    def signal(self, number: int) -> None:
        """Send a signal to the core."""
        self.process.send_signal(number)

    def stop(self) -> None:
        """Clean stop."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text()


class Engine:
    """Stock vLLM in a process of its own (``driver.py``)."""

    def __init__(self, model: Path, folder: Path, port: int | None = None, **settings: Any) -> None:
        """``port``: of the LMCache server; None = plain vLLM. ``settings`` go to ``vllm.LLM``."""
        extra = settings.pop("extra_config", {})
        policy = settings.pop("kv_load_failure_policy", None)
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", **settings.pop("environment", {})}
        arguments: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 8192,
            "max_num_seqs": 16,
            "disable_log_stats": False,
            **settings,
        }
        if port is not None:
            transfer: dict[str, Any] = {
                "kv_connector": "LMCacheMPConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port, **extra},
            }
            if policy:
                transfer["kv_load_failure_policy"] = policy
            arguments["kv_transfer_config"] = transfer
        self._log_path = folder / f"engine-{time.monotonic_ns()}.log"
        self._log = self._log_path.open("wb")
        self.process = subprocess.Popen(
            [sys.executable, str(DRIVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=vllm_environment(environment),
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._send(arguments)
            self._receive(START_S)
        except BaseException:
            self.close()
            raise

    def generate(self, prompts: list[list[int]], max_tokens: int = 16, salt: str | None = None) -> dict[str, Any]:
        """Greedy decoding of all prompts together: tokens, cached, finish, seconds."""
        return self.call("generate", prompts=prompts, max_tokens=max_tokens, salt=salt)

    def call(self, operation: str, **job: Any) -> dict[str, Any]:
        """One job of the driver."""
        self.begin(operation, **job)
        return self.finish()

    def begin(self, operation: str, **job: Any) -> None:
        """Start a job; ``finish`` waits for it."""
        self._send({"op": operation, **job})

    def finish(self) -> dict[str, Any]:
        """The answer to ``begin``."""
        return self._receive(ANSWER_S)

    def _send(self, document: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(document).encode() + b"\n")
        self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"vLLM did not answer:\n{self.log[-4000:]}") from None
        if answer is None:
            raise RuntimeError(f"vLLM ended:\n{self.log[-4000:]}")
        if "error" in answer:
            raise RuntimeError(f"{answer['error']}\n{self.log[-4000:]}")
        return answer

    @property
    def log(self) -> str:
        """What vLLM and the connector have said."""
        return self._log_path.read_text(errors="replace")

    def close(self) -> None:
        """End vLLM."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
        self._reader.join(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def vllm_environment(more: dict[str, str]) -> dict[str, str]:
    """Environment of a vLLM process under test."""
    # OMP_NUM_THREADS breaks vLLM's own binding of threads to cores; the rest keeps it from looking for a network.
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    quiet = {
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    return {**kept, **quiet, **more}
