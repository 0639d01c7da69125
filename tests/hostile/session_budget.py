"""Servers that are killed and stopped at random under the connectors' asking side: how long do its calls take?

``python tests/hostile/session_budget.py --faults 1000 --seed 1`` prints the distribution for each call of the session,
and for questions from ``ask`` to their end, whose budget is ``BUDGET_S``. Exit status 1 where a call took more than
50 ms, or a question more than its budget and 50 ms, by itself; what a busy machine adds is told apart by the kernel's
account of the thread, and by a thread that does nothing but sleep a millisecond and see how late it wakes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "server"), str(Path(__file__).parent)]

from harness import Child  # noqa: E402 - the path is set above
from harness_engine import NUM_PROMPTS, PROMPT_CHUNKS  # noqa: E402
from harness_session import percentiles  # noqa: E402
from server_running import Engine, Server, eventually, free_ports  # noqa: E402

from lmcache.errors import LMCacheError  # noqa: E402
from lmcache.wire import messages as m  # noqa: E402
from lmcache.wire.attach import attach  # noqa: E402

LANES = 2
PAUSE_S_MAX = 0.5
STOP_S_MAX = 2.6  # beyond the budget of a question and the deadline of a lookup
POOL_GB = 0.0625
HELD_PROMPTS = 100


class Quick(Server):
    """A server that is taken for up once an engine can attach: its HTTP side is not needed here."""

    def healthy(self) -> bool:
        """Whether the core lets a process in."""
        ask = m.Attach(version=m.WIRE_VERSION, pid=os.getpid(), name="looking", want_pool=False)
        with contextlib.suppress(LMCacheError, OSError):
            attach(self.attach_path, ask, 1.0).close()
            return True
        return False

    def restart(self) -> None:
        """Kill it, and start it on the same RPC port at once; its HTTP port may be held by a dying service."""
        self.kill()
        self.http_port = free_ports()[0]
        self.options[1] = f"--http-port={self.http_port}"
        self.start()

    def end(self) -> None:
        """Kill it, and leave no pool behind."""
        self.kill()
        for name in ("pool", "records"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{self.pool_folder}/{name}")
        with contextlib.suppress(OSError):
            os.rmdir(self.pool_folder)


class Lane(threading.Thread):
    """One server and the process that asks it."""

    def __init__(self, folder: str, faults: int, seed: int) -> None:
        super().__init__(name=f"lane {seed}")
        self.counts: Counter[str] = Counter()
        self.seen: dict[str, Any] = {}
        self.failure: BaseException | None = None
        self._folder = folder
        self._faults = faults
        self._random = random.Random(seed)

    def run(self) -> None:
        """All faults; what went wrong is kept for who joins."""
        try:
            os.makedirs(self._folder)
            server = Quick(self._folder, "--l2-path", f"{self._folder}/l2", "--l2-size-gb", "0.25", pool_gb=POOL_GB)
            server.start()
            try:
                self._work(server)
            finally:
                server.end()
        except BaseException as error:
            self.failure = error

    def _work(self, server: Quick) -> None:
        self._fill(server)
        session = Child("harness_session.py", server.rpc_port, self._random.randrange(1 << 30))
        try:
            assert session.hear() == "ready"
            for _ in range(self._faults):
                time.sleep(self._random.uniform(0.0, PAUSE_S_MAX))
                if self._random.random() < 0.5:
                    server.restart()
                    self._fill(server)
                    self.counts["killed"] += 1
                else:
                    server.process.send_signal(signal.SIGSTOP)
                    time.sleep(self._random.uniform(0.01, STOP_S_MAX))
                    server.process.send_signal(signal.SIGCONT)
                    self.counts["stopped"] += 1
                assert session.process.poll() is None, "the asking process ended"
            self.seen = session.end("")
        finally:
            if session.process.poll() is None:
                session.kill()

    def _fill(self, server: Quick) -> None:
        """Two thirds of the prompts are in L1; for the others the tier is asked."""
        engine = Engine(server)
        try:
            eventually(lambda: engine.call(m.Ping(0)).ready_bytes == len(engine.pool), "all of L1 is allocated")
            for start in range(HELD_PROMPTS):
                engine.store([(start, number) for number in range(PROMPT_CHUNKS)])
        finally:
            engine.close()


class Control(threading.Thread):
    """Sleeps a millisecond, again and again, and notes how late it woke."""

    def __init__(self) -> None:
        super().__init__(name="control", daemon=True)
        self.late_ms: list[float] = []
        self.is_over = False

    def run(self) -> None:
        """Until told."""
        while not self.is_over:
            due = time.monotonic() + 0.001
            time.sleep(0.001)
            self.late_ms.append((time.monotonic() - due) * 1000)


def run(faults: int, seed: int) -> tuple[Counter[str], list[dict[str, Any]], dict[str, float]]:
    """What was done, what each lane's session saw, and how late the control thread woke."""
    assert HELD_PROMPTS < NUM_PROMPTS
    control = Control()
    control.start()
    with tempfile.TemporaryDirectory() as folder:
        lanes = [Lane(f"{folder}/{number}", faults // LANES, seed * LANES + number) for number in range(LANES)]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
    control.is_over = True
    control.join()
    for lane in lanes:
        if lane.failure is not None:
            raise lane.failure
    return sum((lane.counts for lane in lanes), Counter()), [lane.seen for lane in lanes], percentiles(control.late_ms)


def main() -> int:
    """Run, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    started = time.monotonic()
    counts, seen, control = run(asked.faults, asked.seed)
    print(f"seed {asked.seed}, {time.monotonic() - started:.0f} s: servers {dict(counts)}")
    for number, lane in enumerate(seen):
        print(f"session {number}:")
        for name, value in lane.items():
            print(f"  {name}: {value}")
    print(f"a thread that only sleeps woke late by ms: {control}")
    bad = sum(lane["own_slow_calls"] + lane["own_late"] for lane in seen)
    raw = sum(lane["slow_calls"] + lane["late"] for lane in seen)
    print(f"{bad} calls and questions later than their budget and 50 ms by themselves, {raw} with the machine's delays")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
