"""Start of the server at several L1 sizes, and what it costs to stand there: time, memory, processor.

    python benchmarks/server_start.py [--json PATH] [--rounds 5] [--idle-s 10]

Time: from spawn to the first 200 of /healthcheck. Beside it, in turn with it: a bare FastAPI + uvicorn + zmq process
that answers the same path, the least that any Python server with an HTTP API and a ZMQ port costs. Memory: of both
server processes, without the pages of L1 they have mapped: Rss as ps counts it, and Pss, where a page that several
processes share is counted once. Processor: of both, over some idle seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import psutil

L1_GB = (0.25, 2.0, 8.0)
BOUND_S, BOUND_MB = 1.0, 100.0
MARGIN_BYTES = 1 << 30

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


class Bare:
    """The bare process, with the same face as ``common.Server``."""

    def __init__(self, folder: Path) -> None:
        http_port, log_path = common.free_port(), folder / "bare.log"
        start = time.monotonic()
        with log_path.open("wb") as log:
            command = [sys.executable, "-c", BARE, str(http_port), str(common.free_port())]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.ready_s = common.wait_for(f"http://127.0.0.1:{http_port}/healthcheck", self.process, log_path) - start


def processes(pid: int) -> list[psutil.Process]:
    """A process and its children."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def memory_mb(pid: int) -> dict[str, float]:
    """Rss and Pss of a process and its children together, in 10**6 bytes, without shared memory files (L1)."""
    rss = pss = 0
    for process in processes(pid):
        for mapping in process.memory_maps(grouped=False):
            if not mapping.path.startswith(("/dev/shm", "/memfd:")):
                rss += mapping.rss
                pss += mapping.pss
    return {"rss_mb": rss / 1e6, "pss_mb": pss / 1e6, "num_processes": float(len(processes(pid)))}


def cpu_s(pid: int) -> float:
    """Processor seconds used so far by a process and its children."""
    return sum(sum(process.cpu_times()[:2]) for process in processes(pid))


def idle(pid: int, idle_s: float) -> dict[str, float]:
    """Share of one core used while nobody asks anything, and the memory afterwards."""
    before = cpu_s(pid)
    time.sleep(idle_s)
    return {"cpu_percent": 100 * (cpu_s(pid) - before) / idle_s, **memory_mb(pid)}


def sizes() -> list[float]:
    """The L1 sizes that fit into this machine's shared memory now."""
    free = min(shutil.disk_usage("/dev/shm").free, psutil.virtual_memory().available)
    return [size for size in L1_GB if size * 2**30 + MARGIN_BYTES <= free]


def run(rounds: int, idle_s: float) -> dict[str, Any]:
    """Starts in turn (bare, then each size, and again), then one idle spell each."""
    fitting = sizes()
    starts: dict[str, list[float]] = {"bare": [], **{f"{size:g}": [] for size in fitting}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(rounds):
            bare = Bare(folder)
            starts["bare"].append(bare.ready_s)
            common.stop(bare.process)
            for size in fitting:
                with common.Server(folder, size) as server:
                    starts[f"{size:g}"].append(server.ready_s)
        standing: dict[str, dict[str, float]] = {}
        bare = Bare(folder)
        standing["bare"] = idle(bare.process.pid, idle_s)
        common.stop(bare.process)
        for size in fitting:
            with common.Server(folder, size) as server:
                server.wait_allocated()
                time.sleep(1)
                standing[f"{size:g}"] = idle(server.process.pid, idle_s)
    return {"rows": {name: {"ready_s": common.spread(times), **standing[name]} for name, times in starts.items()}}


def show(rows: dict[str, Any]) -> None:
    """The table."""
    print(f"{'L1':>8}  {'healthy after':>22}  {'Rss':>9}  {'Pss':>9}  {'idle cpu':>9}  {'processes':>9}")
    for name, row in rows.items():
        print(
            f"{name if name == 'bare' else name + ' GB':>8}  {common.text(row['ready_s'], 's', 2):>22}"
            f"  {row['rss_mb']:>6.0f} MB  {row['pss_mb']:>6.0f} MB  {row['cpu_percent']:>7.2f} %"
            f"  {row['num_processes']:>9.0f}"
        )


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="starts of each (default 5)")
    parser.add_argument("--idle-s", type=float, default=10.0, help="idle seconds watched (default 10)")
    args = parser.parse_args()
    if args.rounds < 2 or args.idle_s <= 0:
        parser.error("--rounds must be at least 2 and --idle-s above 0")
    facts = common.head()
    result = run(args.rounds, args.idle_s)
    show(result["rows"])
    common.write(args.json, {**facts, **result})
    ours = {name: row for name, row in result["rows"].items() if name != "bare"}
    reached = [
        common.judge(f"healthy at {name} GB", row["ready_s"]["median"], BOUND_S, "s") for name, row in ours.items()
    ]
    reached += [common.judge(f"Rss at {name} GB", row["rss_mb"], BOUND_MB, "MB") for name, row in ours.items()]
    return os.EX_OK if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
