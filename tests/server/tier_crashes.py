"""Kills a server with a tier at random moments of storing, writing down and promoting, and looks at what is left.

Run it for as long as you like: ``python tests/server/tier_crashes.py --kills 500 --seed 1``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

from server_running import WAIT_S, Engine, Engines, Server, eventually, running

from lmcache.errors import LMCacheError
from lmcache.wire import messages as m

REMEMBERED = 400
BATCH = 8
MISSES_MAX = 500
PROGRESS_KILLS = 50


class Harness:
    """One server, one folder, and the expected state: names whose bytes the tier has acknowledged."""

    def __init__(self, server: Server, folder: Path, seed: int) -> None:
        self.server = server
        self.folder = folder
        self.random = random.Random(seed)
        self.acknowledged: list[object] = []
        self.tried: list[object] = []
        self.num_hits = 0
        self.num_verified = 0
        self.num_misses = 0
        self._num_misses = 0
        self._last = 0

    def round(self) -> None:
        """Work until the kill, start anew, check."""
        with ExitStack() as stack:
            engine = Engines(stack)(self.server)
            self._store_acknowledged(engine)
            engine.patience_s = 0.5  # of what is killed nobody wants an answer
            killer = threading.Thread(target=self._kill_later)
            killer.start()
            with contextlib.suppress(LMCacheError, OSError, AssertionError):
                while killer.is_alive():
                    self._work(engine)
            killer.join()
        self.server.process.wait(WAIT_S)
        if self.random.random() < 0.7:  # else the pool is adopted, and L1 and the tier must agree
            for name in ("pool", "records"):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(f"{self.server.pool_folder}/{name}")
        self.server.start()
        eventually(self._is_up, "the tier is in use")
        with ExitStack() as stack:
            self._check(Engines(stack)(self.server))

    def _is_up(self) -> bool:
        code, status = self.server.ask("/status")
        return code == 200 and bool(status["storage_manager"]["l2_adapters"][0]["is_healthy"])

    def _holds_nothing(self) -> bool:
        code, status = self.server.ask("/status")
        return code == 200 and status["storage_manager"]["l1_manager"]["read_locked_count"] == 0

    def _names(self) -> list[object]:
        first, self._last = self._last, self._last + BATCH
        return [("chunk", number) for number in range(first, self._last)]

    def _store_acknowledged(self, engine: Engine) -> None:
        """What all tiers have said to have, before anything is killed."""
        names = self._names()
        puts = self._puts()
        stored = engine.store(names)
        assert stored == len(names), f"{stored} of {len(names)} stored"
        eventually(lambda: self._puts() >= puts + len(names), "the tier has acknowledged")
        self.acknowledged = (self.acknowledged + names)[-REMEMBERED:]

    def _puts(self) -> float:
        code, text = self.server.ask("/metrics")
        lines = [line for line in str(text).splitlines() if line.startswith("lmcache_mp_l2_puts_total")]
        return float(lines[0].split()[1]) if code == 200 and lines else 0.0

    def _kill_later(self) -> None:
        time.sleep(self.random.uniform(0, 0.25))
        if self.random.random() < 0.2:
            pid = self.server.service_pid()
            if pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                time.sleep(self.random.uniform(0, 0.1))
        self.server.process.kill()

    def _work(self, engine: Engine) -> None:
        if self.random.random() < 0.5:
            names = self._names()
            self.tried = (self.tried + names)[-REMEMBERED:]
            engine.store(names)
        else:
            self.server.ask("/cache/clear", b"")
            start = self.random.randrange(max(1, len(self.acknowledged) - BATCH))
            self._verify(engine, self.acknowledged[start : start + BATCH])

    def _verify(self, engine: Engine, names: list[object]) -> int:
        found = engine.promote(names)
        assert all(engine.verified(found, names)), "wrong bytes"
        self.num_hits += found.num_chunks
        self.num_verified += found.num_chunks
        if found.lease:
            engine.call(m.Release(0, lease=found.lease))
        return found.num_chunks

    def _count(self) -> str:
        """Not empty once the chunks have been missed too often to be late only."""
        self._num_misses += 1
        self.num_misses += 1
        return "missed" if self._num_misses > MISSES_MAX else ""

    def _check(self, engine: Engine) -> None:
        for start in range(0, len(self.acknowledged), BATCH):
            self._num_misses = 0
            names = self.acknowledged[start : start + BATCH]
            # A tier that was slow for a moment is left alone for some seconds; that is a miss, not a loss.
            found = eventually(lambda names=names: self._verify(engine, names) == len(names) or self._count())
            if found is not True:
                raise SystemExit(f"lost: one of {names}, which the tier had acknowledged\n{self.server.log()[-4000:]}")
        for name in self.tried:
            self._verify(engine, [name])
        litter = [path for path in self.folder.rglob("*") if path.is_file() and ".tmp" in path.name]
        eventually(lambda: not any(path.exists() for path in litter), "no litter is left")
        eventually(self._holds_nothing, "all leases have ended")


def run(kills: int, seed: int) -> Harness:
    """So many kills; raises at the first thing that is wrong."""
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        options = ["--l2-path", str(folder / "l2"), "--l2-size-gb", "4"]
        with running(where, *options) as server:
            harness = Harness(server, folder / "l2", seed)
            eventually(harness._is_up)
            for number in range(1, kills + 1):
                harness.round()
                if number % PROGRESS_KILLS == 0:
                    print(f"{number} kills", flush=True)
            return harness


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    started = time.monotonic()
    done = run(asked.kills, asked.seed)
    print(
        f"{asked.kills} kills in {time.monotonic() - started:.0f} s, seed {asked.seed}: "
        f"{done.num_verified} chunks read back, all byte-exact; nothing acknowledged was lost "
        f"({done.num_misses} misses of a tier that was left alone, found later)"
    )
