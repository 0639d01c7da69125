"""Engines and a server with a tier, killed, stopped and partitioned at random; every byte that is used is checked.

Run it for as long as you like: ``python tests/hostile/harness.py --minutes 60 --seed 1``. A round is some faults while
all work, then rest: within a second nothing may be leased or reserved. At the end the counts are printed, and how long
the calls of the session API took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "server"))

from server_running import WAIT_S, Server, eventually, running  # noqa: E402 - the path is set above

NUM_ENGINES = 3
FAULTS_A_ROUND = 8
STOP_S_MAX = 1.5
POOL_GB = 0.03125  # 512 chunks of the engines' 1,200: much is evicted, and comes back from the tier
TIER_GB = "0.0625"


class Child:
    """A process that obeys words on its standard input."""

    def __init__(self, script: str, *arguments: object) -> None:
        command = [sys.executable, str(HERE / script), *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def say(self, word: str) -> None:
        """One word; to whom is dead, nothing."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{word}\n")
            self.process.stdin.flush()

    def hear(self) -> str:
        """One line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def end(self, word: str = "end") -> dict[str, Any]:
        """What it saw."""
        self.say(word)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        said = self.process.stdout.read()
        self.process.stdout.close()
        status = self.process.wait(WAIT_S)
        assert status == 0, (status, said)
        seen: dict[str, Any] = json.loads(said)
        return seen

    def kill(self) -> None:
        """Kill it and forget what it saw."""
        self.process.kill()
        self.process.communicate()


class Harness:
    """One server, some engines, one scheduler, and a source of faults."""

    def __init__(self, server: Server, seed: int) -> None:
        self.server = server
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.seen: Counter[str] = Counter()
        self.quiet_s: list[float] = []
        self.engines = [self._engine() for _ in range(NUM_ENGINES)]
        self.session = self._session()
        self._waking: list[threading.Timer] = []

    def _engine(self) -> Child:
        return Child("harness_engine.py", self.server.attach_path, self.random.randrange(1 << 30))

    def _session(self) -> Child:
        session = Child("harness_session.py", self.server.rpc_port, self.random.randrange(1 << 30))
        assert session.hear() == "ready"
        return session

    # --- faults

    def round(self) -> None:
        """Some faults, then rest."""
        deeds: list[tuple[float, Callable[[], None]]] = [
            (4, self._kill_engine),
            (3, self._stop_engine),
            (3, self._cut_engine),
            (3, self._kill_server),
            (3, self._stop_server),
            (2, self._kill_service),
            (2, self._stop_service),
        ]
        weights, acts = [weight for weight, _ in deeds], [act for _, act in deeds]
        for _ in range(FAULTS_A_ROUND):
            time.sleep(self.random.uniform(0.0, 0.5))
            act = self.random.choices(acts, weights)[0]
            act()
            self.faults[act.__name__.strip("_")] += 1
            self._check_engines()
        self._rest()

    def _kill_engine(self) -> None:
        number = self.random.randrange(NUM_ENGINES)
        self.engines[number].kill()
        self.engines[number] = self._engine()

    def _stop_engine(self) -> None:
        self._stop(self.random.choice(self.engines).process.pid)

    def _cut_engine(self) -> None:
        self.random.choice(self.engines).say("cut")

    def _kill_server(self) -> None:
        self._wake()  # a core that is stopped dies, too; its service must be able to see it
        self.server.kill()
        self._wait_for_port()
        self.server.start()

    def _wait_for_port(self) -> None:
        """A service that had just been started may outlive its core for as long as it takes to import its libraries."""

        def is_free() -> bool:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", self.server.http_port))
                    probe.listen()
                except OSError:
                    self.seen["waits for the port of a dead server"] += 1
                    return False
            return True

        eventually(is_free, "nobody listens at a dead server's port")

    def _stop_server(self) -> None:
        self._stop(self.server.process.pid)

    def _kill_service(self) -> None:
        pid = self.server.service_pid()
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _stop_service(self) -> None:
        pid = self.server.service_pid()
        if pid is not None:
            self._stop(pid)

    def _stop(self, pid: int) -> None:
        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        timer = threading.Timer(self.random.uniform(0.05, STOP_S_MAX), go_on)
        timer.start()
        self._waking.append(timer)

    def _wake(self) -> None:
        """Wait until nobody is stopped any more."""
        for timer in self._waking:
            timer.join()
        self._waking.clear()

    # --- checks

    def _check_engines(self) -> None:
        for engine in self.engines:
            if engine.process.poll() is not None:
                raise SystemExit(f"an engine ended: {engine.process.communicate()[0]}\n{self.server.log()[-4000:]}")

    def _rest(self) -> None:
        """Everybody gives back all they have, but one engine, which dies with it; then nothing is held any more."""
        self._wake()
        eventually(self.server.healthy, "the server is well")
        self._take(self.session.end(""))
        for engine in self.engines:
            engine.say("rest")
        for engine in self.engines:
            said = engine.hear()
            if not said.startswith("{"):
                raise SystemExit(f"{said}\n{self.server.log()[-4000:]}")
            self._add(json.loads(said))
        self.engines[0].say("hold")
        assert self.engines[0].hear() == "holding"
        eventually(lambda: self._gauge("unwritten_chunks") == 0, "the tier has everything")  # that takes leases, too
        assert self._num_held() >= 2
        self.engines[0].process.kill()
        started = time.monotonic()
        eventually(lambda: self._num_held() == 0, "nothing is leased or reserved")
        self.quiet_s.append(time.monotonic() - started)
        self.engines[0].kill()
        self.engines[0] = self._engine()
        self.session = self._session()
        for engine in self.engines:
            engine.say("work")

    def _gauge(self, name: str) -> float:
        code, text = self.server.ask("/metrics")
        lines = [line for line in str(text).splitlines() if line.startswith(f"lmcache_mp_{name} ")]
        return float(lines[0].split()[1]) if code == 200 and lines else -1.0

    def _num_held(self) -> int:
        code, status = self.server.ask("/status")
        if code != 200:
            return 1 << 30
        l1 = status["storage_manager"]["l1_manager"]
        return int(status["active_sessions"]) + int(l1["write_locked_count"])

    def _take(self, seen: dict[str, Any]) -> None:
        for name in ("calls", "questions", "answers", "misses", "unasked", "late", "slow_calls"):
            self.seen[f"session {name}"] += seen[name]
        for name in ("calls_ms", "waited_ms", "questions_ms"):
            for place, value in seen[name].items():
                self.seen[f"session {name} {place}"] = max(self.seen[f"session {name} {place}"], value)

    def end(self) -> None:
        """All stop; what they saw is added up."""
        self._wake()
        self._take(self.session.end(""))
        for engine in self.engines:
            self._add(engine.end())

    def _add(self, seen: dict[str, int]) -> None:
        for name, count in seen.items():
            self.seen[f"engine {name}"] += count

    def close(self) -> None:
        """Nobody is left, whatever happened."""
        for timer in self._waking:
            timer.join()
        for child in (*self.engines, self.session):
            if child.process.poll() is None:
                child.kill()


def run(seconds: float, seed: int) -> Harness:
    """Rounds for so long; raises at the first thing that is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--l2-path", f"{folder}/l2", "--l2-size-gb", TIER_GB]
        with running(folder, *options, pool_gb=POOL_GB) as server:
            harness = Harness(server, seed)
            until = time.monotonic() + seconds
            try:
                while time.monotonic() < until:
                    harness.round()
                harness.end()
            finally:
                harness.close()
            return harness


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    done = run(asked.minutes * 60, asked.seed)
    print(f"seed {asked.seed}, {asked.minutes:g} minutes, {len(done.quiet_s)} rounds: no wrong byte, nothing left held")
    print("faults:", dict(done.faults))
    for what, count in sorted(done.seen.items()):
        print(f"  {what}: {count}")
    print(f"  seconds from rest to nothing held: worst {max(done.quiet_s):.3f}")
