"""A well-behaved engine in a process of its own that measures whether it is served, and what its server grows to.

As a program: ``witness.py ATTACH_PATH`` stores, looks up and checks bytes until its standard input ends, then prints
what it saw as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from server_running import WAIT_S, Engine, Server, eventually

from lmcache.wire import messages as m

GROWTH_MIB_MAX = 64
"""What the core or the service may grow by during an attack, at any moment."""

HANG_S = 20.0
"""A lookup of the witness that takes this long counts as a hang; on an idle machine one takes 0.3 ms."""


@dataclass
class Testimony:
    """What the witness and the watch over memory saw; filled when the attack is over."""

    num_lookups: int = 0
    median_ms: float = 0.0
    worst_ms: float = 0.0
    growth_mib: dict[str, float] | None = None


@contextlib.contextmanager
def watched(server: Server, growth_mib: float = GROWTH_MIB_MAX) -> Iterator[Testimony]:
    """Around an attack: others were served throughout, memory stayed bounded, and the server is well afterwards."""
    testimony = Testimony()
    pids = {"core": server.process.pid, "service": server.service_pid()}
    before = {name: _memory_mib(pid, "VmRSS") for name, pid in pids.items()}
    for pid in pids.values():
        with open(f"/proc/{pid}/clear_refs", "w") as file:
            file.write("5")  # the peak counts from here
    command = [sys.executable, __file__, server.attach_path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as witness:
        assert witness.stdin is not None
        assert witness.stdout is not None
        assert witness.stdout.readline() == "ready\n"
        try:
            yield testimony
        finally:
            witness.stdin.close()
            said = witness.stdout.read()
    assert witness.returncode == 0, said
    seen: dict[str, Any] = json.loads(said)
    testimony.num_lookups, testimony.median_ms, testimony.worst_ms = seen["n"], seen["median_ms"], seen["worst_ms"]
    assert testimony.num_lookups > 0
    assert testimony.worst_ms < HANG_S * 1000, seen
    assert server.process.poll() is None, server.log()[-4000:]
    assert server.service_pid() == pids["service"], server.log()[-4000:]
    growth = {name: _memory_mib(pid, "VmHWM") - before[name] for name, pid in pids.items()}
    testimony.growth_mib = growth
    assert max(growth.values()) < growth_mib, growth
    eventually(server.healthy)
    print(f"witness: {testimony}")


def _memory_mib(pid: int | None, field: str) -> float:
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(f"{field}:")) / 1024


def main(attach_path: str) -> None:
    """Be a good engine until told to stop."""
    engine = Engine(SimpleNamespace(attach_path=attach_path))  # type: ignore[arg-type]
    names: list[object] = [("witness", os.getpid(), number) for number in range(4)]
    assert engine.store(names) == len(names)
    times: list[float] = []
    print("ready", flush=True)
    while not times or not select.select([sys.stdin], [], [], 0)[0]:
        started = time.monotonic()
        found = engine.lookup(names)
        times.append((time.monotonic() - started) * 1000)
        if found.num_chunks < len(names):
            engine.store(names)  # evicted, or cleared
        assert all(engine.verified(found, names)), "wrong bytes"
        if found.lease:
            engine.call(m.Release(0, lease=found.lease))
        time.sleep(0.002)
    engine.close()
    times.sort()
    print(json.dumps({"n": len(times), "median_ms": times[len(times) // 2], "worst_ms": times[-1]}))


if __name__ == "__main__":
    assert WAIT_S > HANG_S
    main(sys.argv[1])
