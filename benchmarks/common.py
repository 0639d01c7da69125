"""What the benchmarks share: the machine in words, medians with their spread, a server under measurement."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_S = 180.0
"""How long a process under measurement may take to answer for the first time."""


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--json", metavar="PATH", help="write the figures to PATH as well")
    return made


def machine() -> str:
    """Processor, cores, memory, load: what a reader must know before comparing."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return (
        f"{model}, {os.cpu_count()} cores, {memory_gb:.0f} GB, Linux {platform.release()}, "
        f"Python {platform.python_version()}, load {load:.1f} at start"
    )


def head() -> dict[str, Any]:
    """Print the machine and the command; returns both for the JSON form."""
    facts = {
        "machine": machine(),
        "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
    print(f"machine: {facts['machine']}\ncommand: {facts['command']}", flush=True)
    return facts


def spread(values: Sequence[float], scale: float = 1.0) -> dict[str, float]:
    """Median, quartiles and extremes of ``values * scale``."""
    ordered = sorted(value * scale for value in values)
    low, middle, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else (ordered[0],) * 3
    return {"median": middle, "q1": low, "q3": high, "min": ordered[0], "max": ordered[-1], "n": float(len(ordered))}


def text(figures: Mapping[str, float], unit: str, digits: int = 1) -> str:
    """``median unit (q1-q3)``."""
    return f"{figures['median']:.{digits}f} {unit} ({figures['q1']:.{digits}f}-{figures['q3']:.{digits}f})"


def judge(name: str, value: float, bound: float, unit: str) -> bool:
    """Print a bound and whether it is reached; returns that."""
    reached = value <= bound
    print(f"{'reached' if reached else 'MISSED '}  {name}: {value:.3g} {unit}, bound {bound:.3g} {unit}", flush=True)
    return reached


def write(path: str | None, document: Mapping[str, Any]) -> None:
    """The JSON form, when asked for."""
    if path:
        Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, pause_s: float = 0.005) -> float:
    """Seconds on the monotonic clock at which ``url`` answered 200 for the first time.

    Raises:
        RuntimeError: the process ended, or did not answer in time; with the end of its log.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return time.monotonic()
        except OSError:
            time.sleep(pause_s)
    stop(process)
    raise RuntimeError(f"no answer at {url}:\n{log.read_text(errors='replace')[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for what does not end in half a minute."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


class Server:
    """``lmcache server`` on free ports of the loopback; ``ready_s`` is the time from spawn to the first 200."""

    def __init__(self, folder: Path, l1_gb: float, python: str = sys.executable) -> None:
        self.port, http_port = free_port(), free_port()
        self.url = f"http://127.0.0.1:{http_port}"
        log_path = folder / f"server-{self.port}.log"
        command = [python, "-m", "lmcache.server", "--port", str(self.port), "--http-port", str(http_port)]
        start = time.monotonic()
        with log_path.open("wb") as log:
            self.process = subprocess.Popen([*command, "--l1-size-gb", f"{l1_gb:g}"], stdout=log, stderr=log)
        self.ready_s = wait_for(f"{self.url}/healthcheck", self.process, log_path) - start

    def status(self) -> dict[str, Any]:
        """GET /status."""
        with urllib.request.urlopen(f"{self.url}/status", timeout=5) as reply:
            return dict(json.loads(reply.read()))

    def wait_allocated(self) -> None:
        """Return once all of L1 exists, so that allocation does not disturb what is measured.

        Raises:
            TimeoutError: it took longer than a start may take.
        """
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            l1 = self.status()["storage_manager"]["l1_manager"]
            if l1["memory_ready_bytes"] >= l1["memory_total_bytes"]:
                return
            time.sleep(0.1)
        raise TimeoutError("L1 was not allocated in time")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(self.process)
