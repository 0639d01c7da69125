"""Start of the server at several L1 sizes, and what it costs to stand there: time, memory, processor.

    python benchmarks/server_start.py [--json PATH] [--upstream PYTHON] [--rounds 5] [--idle-s 10]

Time: from spawn to the first 200 of /healthcheck. Beside it, in turn with it: a bare FastAPI + uvicorn + zmq process
that answers the same path, the least that any Python server with an HTTP API and a ZMQ port costs, and upstream's
server with the same L1. Memory: of all processes of a server, without the pages of L1 they have mapped where L1 is a
file in shared memory (ours, and upstream's with --shm-name): Rss as ps counts it, and Pss, where a page that several
processes share is counted once. Processor: over some idle seconds. Ours is counted after all of L1 was allocated.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import psutil
from common import Row, Spread, Started
from upstream import Upstream

L1_GB = (0.25, 2.0, 8.0)
START_RATIO, RSS_MB, CPU_PERCENT = 1.3, 100.0, 0.3
MARGIN_BYTES = 1 << 30
SETTLE_S = 1.0
UPSTREAM_ROUNDS = 2
"""Its start takes some seconds, so it takes part in the first rounds only."""

BARE = """
import sys, threading
import fastapi, uvicorn, zmq
router = zmq.Context().socket(zmq.ROUTER)
router.bind(f"tcp://127.0.0.1:{sys.argv[2]}")
def echo():
    while True:
        router.send_multipart(router.recv_multipart())
threading.Thread(target=echo, daemon=True).start()
app = fastapi.FastAPI()
@app.get("/healthcheck")
def health():
    return {"status": "healthy"}
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


class Bare(Started):
    """The bare process."""

    def __init__(self, folder: Path) -> None:
        http_port, log_path = common.free_port(), folder / "bare.log"
        start = time.monotonic()
        with log_path.open("wb") as log:
            command = [sys.executable, "-c", BARE, str(http_port), str(common.free_port())]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.ready_s = common.wait_for(f"http://127.0.0.1:{http_port}/healthcheck", self.process, log_path) - start


Starter = Callable[[], Started]


def processes(pid: int) -> list[psutil.Process]:
    """A process and its children."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def memory_mb(pid: int) -> tuple[float, float]:
    """Rss and Pss of a process and its children together, in 10**6 bytes, without shared memory files (L1)."""
    rss = pss = 0
    for process in processes(pid):
        for mapping in process.memory_maps(grouped=False):
            if not mapping.path.startswith(("/dev/shm", "/memfd:")):
                rss += mapping.rss
                pss += mapping.pss
    return rss / 1e6, pss / 1e6


def cpu_s(pid: int) -> float:
    """Processor seconds used so far by a process and its children."""
    return sum(sum(process.cpu_times()[:2]) for process in processes(pid))


def idle(started: Started, idle_s: float) -> tuple[float, float, float]:
    """Rss and Pss in MB, and the share of one core in percent, while nobody asks anything."""
    pid = started.process.pid
    if isinstance(started, common.Server):
        started.wait_allocated()
    time.sleep(SETTLE_S)
    before = cpu_s(pid)
    time.sleep(idle_s)
    percent = 100 * (cpu_s(pid) - before) / idle_s
    return *memory_mb(pid), percent


def sizes() -> list[float]:
    """The L1 sizes that fit into this machine's shared memory now."""
    free = min(shutil.disk_usage("/dev/shm").free, psutil.virtual_memory().available)
    return [size for size in L1_GB if size * 2**30 + MARGIN_BYTES <= free]


def starters(folder: Path, l1_gb: float, upstream: str | None) -> dict[str, Starter]:
    """What starts in turn, by name."""
    found: dict[str, Starter] = {"ours": lambda: common.Server(folder, l1_gb), "bare": lambda: Bare(folder)}
    if upstream is not None:
        found["upstream"] = lambda: Upstream(folder, upstream, l1_gb, "shm")
    return found


def start_row(title: str, starting: dict[str, Starter], rounds: int) -> Row:
    """Starts of all in turn; the ratio to the bare process is judged."""
    times: dict[str, list[float]] = {name: [] for name in starting}
    for index in range(rounds):
        for name, start in starting.items():
            if name == "upstream" and index >= UPSTREAM_ROUNDS:
                continue
            with start() as started:
                times[name].append(started.ready_s)
    figures = {name: common.spread(values) for name, values in times.items()}
    ratio = figures["ours"]["median"] / figures["bare"]["median"]
    return Row(f"start to healthy, L1 of {title}", "s", figures, ratio, "ours / bare", START_RATIO)


def idle_rows(title: str, starting: dict[str, Starter], idle_s: float) -> list[Row]:
    """Memory and processor of all, one after the other."""
    figures: tuple[dict[str, Spread], ...] = ({}, {}, {})
    for name, start in starting.items():
        with start() as started:
            for column, value in zip(figures, idle(started, idle_s), strict=True):
                column[name] = common.spread([value])
    rss, pss, cpu = figures
    return [
        Row(f"idle Rss, L1 of {title}", "MB", rss, rss["ours"]["median"], "ours", RSS_MB),
        Row(f"idle Pss, L1 of {title}", "MB", pss),
        Row(f"idle processor, L1 of {title}", "%", cpu, cpu["ours"]["median"], "ours", CPU_PERCENT),
    ]


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__, has_upstream=True)
    parser.add_argument("--rounds", type=int, default=5, help="starts of each (default 5)")
    parser.add_argument("--idle-s", type=float, default=10.0, help="idle seconds watched (default 10)")
    args = parser.parse_args()
    if args.rounds < 2 or args.idle_s <= 0:
        parser.error("--rounds must be at least 2 and --idle-s above 0")
    report = common.Report()
    with tempfile.TemporaryDirectory() as name:
        fitting = {f"{size:g} GB": starters(Path(name), size, args.upstream) for size in sizes()}
        for title, starting in fitting.items():
            report.add(start_row(title, starting, args.rounds))
        for title, starting in fitting.items():
            for row in idle_rows(title, starting, args.idle_s):
                report.add(row)
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
