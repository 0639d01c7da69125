"""Engines and a server with a tier, killed, stopped and partitioned at random; every byte that is used is checked.

Run it for as long as you like: ``python tests/hostile/harness.py --minutes 60 --seed 1``, or until so many processes
have been killed: ``--kills 2000``. A round is some faults while all work, then rest: within a second nothing may be
leased or reserved. At the end the counts are printed, and how long the calls of the session API took.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
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
FAULTS_A_ROUND = 16
PAUSE_S_MAX = 0.3
STOP_S_MAX = 1.5
POOL_GB = 0.03125  # 512 chunks of the engines' 1,200: much is evicted, and comes back from the tier
TIER_GB = "0.0625"
PROGRESS_ROUNDS = 20


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
        self.num_kills = 0  # processes that were killed: engines, cores, services
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
            (12, self._kill_engine),
            (3, self._stop_engine),
            (3, self._cut_engine),
            (3, self._kill_server),
            (3, self._stop_server),
            (3, self._kill_service),
            (2, self._stop_service),
        ]
        weights, acts = [weight for weight, _ in deeds], [act for _, act in deeds]
        for _ in range(FAULTS_A_ROUND):
            time.sleep(self.random.uniform(0.0, PAUSE_S_MAX))
            act = self.random.choices(acts, weights)[0]
            act()
            self.faults[act.__name__.strip("_")] += 1
            self._check_engines()
        self._rest()

    def _kill_engine(self) -> None:
        number = self.random.randrange(NUM_ENGINES)
        self.engines[number].kill()
        self.num_kills += 1
        self.engines[number] = self._engine()

    def _stop_engine(self) -> None:
        self._stop(self.random.choice(self.engines).process.pid)

    def _cut_engine(self) -> None:
        self.random.choice(self.engines).say("cut")

    def _kill_server(self) -> None:
        self._wake()  # a core that is stopped dies, too; its service must be able to see it
        self.server.kill()
        self.num_kills += 1
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
                self.num_kills += 1

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
        self.num_kills += 1
        started = time.monotonic()
        eventually(lambda: self._num_held() == 0, "nothing is leased or reserved")
        self.quiet_s.append(time.monotonic() - started)
        self._check_counters()
        self.engines[0].kill()
        self.engines[0] = self._engine()
        self.session = self._session()
        for engine in self.engines:
            engine.say("work")

    def _gauge(self, name: str) -> float:
        return self._metrics().get(name, -1.0)

    def _metrics(self) -> dict[str, float]:
        """All numbers without labels, by name; empty where the service does not answer."""
        code, text = self.server.ask("/metrics")
        lines = [line.split() for line in str(text).splitlines() if line.startswith("lmcache_mp_") and "{" not in line]
        return {name.removeprefix("lmcache_mp_"): float(value) for name, value in lines} if code == 200 else {}

    def _check_counters(self) -> None:
        """What came, less what went, is what is there; nothing went that did not come."""
        seen = eventually(self._metrics, "numbers")
        # The server's own cascade attaches as engines do, and is not shown among them.
        cascades = seen["attaches_total"] - seen["detaches_total"] - seen["attached_processes"]
        assert cascades in (0, 1), f"processes that ended, and those that are there, are not all that came: {seen}"
        assert seen["active_sessions"] == 0
        assert seen["faults_total"] == 0
        for less, more in (
            ("retrieves", "leases"),
            ("stored_chunks", "reserved_chunks"),
            ("lookup_hit_tokens", "lookup_requested_tokens"),
            ("lookups", "requests"),
            ("refused", "requests"),
            ("abandoned_promotions", "promotions"),
        ):
            assert seen[f"{less}_total"] <= seen[f"{more}_total"], f"more {less} than {more}: {seen}"

    def _num_held(self) -> int:
        code, status = self.server.ask("/status")
        if code != 200:
            return 1 << 30
        l1 = status["storage_manager"]["l1_manager"]
        return int(status["active_sessions"]) + int(l1["write_locked_count"])

    def _take(self, seen: dict[str, Any]) -> None:
        for name, value in seen.items():
            if isinstance(value, dict):
                for place, spent in value.items():
                    self.seen[f"session {name} {place}"] = max(self.seen[f"session {name} {place}"], spent)
            else:
                self.seen[f"session {name}"] += value

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


def run(seed: int, *, seconds: float = math.inf, kills: float = math.inf) -> Harness:
    """Rounds for so long, or until so many processes were killed; raises at the first thing that is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--l2-path", f"{folder}/l2", "--l2-size-gb", TIER_GB]
        with running(folder, *options, pool_gb=POOL_GB) as server:
            harness = Harness(server, seed)
            started = time.monotonic()
            try:
                while time.monotonic() - started < seconds and harness.num_kills < kills:
                    harness.round()
                    if len(harness.quiet_s) % PROGRESS_ROUNDS == 0:
                        print(f"{harness.num_kills} kills, {harness.seen['engine accepted']} chunks used", flush=True)
                harness.end()
            finally:
                harness.close()
            return harness


def main() -> None:
    """Run, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, help="10 where no number of kills is asked for")
    parser.add_argument("--kills", type=float, default=math.inf)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    minutes = asked.minutes or (10.0 if math.isinf(asked.kills) else math.inf)
    started = time.monotonic()
    done = run(asked.seed, seconds=minutes * 60, kills=asked.kills)
    seconds = time.monotonic() - started
    print(
        f"seed {asked.seed}, {seconds:.0f} s, {len(done.quiet_s)} rounds, {done.num_kills} processes killed: "
        f"{done.seen['engine accepted']} chunks used, no wrong byte, nothing left held"
    )
    print("faults:", dict(done.faults))
    for what, count in sorted(done.seen.items()):
        print(f"  {what}: {count}")
    print(f"  seconds from rest to nothing held: worst {max(done.quiet_s):.3f}")


if __name__ == "__main__":
    main()
