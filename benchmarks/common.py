"""What the benchmarks share: the machine in words, rows of figures with their bounds, a server under measurement."""

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
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

START_S = 180.0
"""How long a process under measurement may take to answer for the first time."""
RUN_VARIABLE = "LMCACHE_BENCH_RUN"
"""Where the suite says which run its benchmarks belong to."""


def parser(doc: str | None, *, has_upstream: bool = False) -> argparse.ArgumentParser:
    """The options that every benchmark has, and that of those which measure upstream's release too."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("--json", metavar="PATH", help="write the figures to PATH as well")
    if has_upstream:
        made.add_argument("--upstream", metavar="PYTHON", help="of an environment of scripts/peer_env.py")
    return made


def machine() -> str:
    """Processor, cores, memory, Linux, Python: what a reader must know before comparing."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory_gb:.0f} GB, Linux {platform.release()}, "
        f"Python {platform.python_version()}"
    )


def commit() -> str:
    """The commit that is measured, ``+`` behind it where files were changed since; empty outside of a checkout."""
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip()


Spread = dict[str, float]
"""median, q1, q3, min, max, n."""


def spread(values: Sequence[float], scale: float = 1.0) -> Spread:
    """Median, quartiles and extremes of ``values * scale``."""
    ordered = sorted(value * scale for value in values)
    low, middle, high = (
        statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else (ordered[0],) * 3
    )
    return {"median": middle, "q1": low, "q3": high, "min": ordered[0], "max": ordered[-1], "n": float(len(ordered))}


def short(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    size = abs(value)
    digits = 0 if size >= 100 or size == 0 else 1 if size >= 10 else 2 if size >= 1 else 3 if size >= 0.01 else 5
    return f"{value:,.{digits}f}"


def text(figures: Mapping[str, float], unit: str, digits: int | None = None) -> str:
    """``median unit (q1-q3)``; three significant digits unless told how many behind the point."""
    middle, low, high = (
        short(figures[name]) if digits is None else f"{figures[name]:.{digits}f}" for name in ("median", "q1", "q3")
    )
    return f"{middle} {unit} ({low}-{high})" if figures["n"] > 1 else f"{middle} {unit}"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a report: what was measured in turn, and the number that is judged.

    ``figures``: by name ("ours", "memcpy", "upstream 0.5.6"), ours first, all in ``unit`` and all of one run.
    ``value`` and ``bound``: a number made of the figures, which ``says`` describes ("ours / memcpy"), and its bound,
    a least value if ``at_least``. Without a bound the row only informs.
    """

    name: str
    unit: str
    figures: dict[str, Spread]
    value: float | None = None
    says: str = ""
    bound: float | None = None
    at_least: bool = False
    note: str = ""

    @property
    def reached(self) -> bool:
        """Whether nothing is missed."""
        if self.bound is None or self.value is None:
            return True
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    @property
    def verdict(self) -> str:
        """``reached``, ``missed``, or nothing where there is no bound."""
        if self.bound is None or self.value is None:
            return ""
        return "reached" if self.reached else "missed"

    def line(self) -> str:
        """The row on one line of a terminal."""
        shown = "  ".join(f"{name} {text(figures, self.unit)}" for name, figures in self.figures.items())
        judged = "" if self.value is None else f"  {self.says} = {short(self.value)}"
        if self.value is not None and self.bound is not None:
            judged += f" (bound {'>=' if self.at_least else '<='} {short(self.bound)}: {self.verdict})"
        return f"{self.name:<44}  {shown}{judged}{'  ' + self.note if self.note else ''}"


@dataclass
class Report:
    """The rows of one benchmark, printed as they come.

    ``run`` names the run that the figures belong to: that of the whole suite where it started the benchmark, else one
    of its own. Figures of different runs are never put beside each other (``suite.py`` refuses).
    """

    rows: list[Row] = field(default_factory=list)
    run: str = field(default_factory=lambda: os.environ.get(RUN_VARIABLE) or uuid.uuid4().hex[:12])
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.facts = {
            "machine": machine(),
            "load": round(os.getloadavg()[0], 1),
            "commit": commit(),
            "command": " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        }
        print(f"machine: {self.facts['machine']}, load {self.facts['load']} at start\ncommand: {self.facts['command']}")

    def add(self, row: Row) -> None:
        """Print a row and keep it."""
        self.rows.append(row)
        print(row.line(), flush=True)

    def end(self, path: str | None, details: object = None) -> int:
        """Write the JSON form when asked for; returns the exit status: 1 where a bound is missed."""
        if path:
            document = {"run": self.run, **self.facts, "rows": [asdict(row) for row in self.rows], "details": details}
            Path(path).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return os.EX_OK if all(row.reached for row in self.rows) else 1


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


class Started:
    """A server under measurement, ended with its block; ``ready_s`` is the time from spawn to the first 200."""

    process: subprocess.Popen[bytes]
    ready_s: float

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stop(self.process)


class Server(Started):
    """``lmcache server`` on free ports of the loopback."""

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
