"""What a server that is killed or stopped costs a stock vLLM engine: pauses of a running answer, late first tokens.

    python benchmarks/engine_pauses.py [--json PATH] [--faults 8] [--model FOLDER]

Run it with the Python of an environment that has vLLM and this project. One long answer after another is streamed, so
that the gaps between its tokens are the engine's steps; beside it prompts of 2048 tokens come one by one, every other
one a prompt that was stored before. First nothing happens to the server, then it is killed and started again, or
stopped for 0.1 to 3 s, at random, then nothing happens again; the quiet phases together last as long as the faulty one.
Bounds: a first token is late by the session's budget (2 s) and 50 ms at most, and no step is longer than the longest of
the quiet phases by more than 50 ms.
"""

from __future__ import annotations

import http.client
import json
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common
from common import Row
from engines import ANSWER_S, VLLM, small_model, transfer_config

PROMPT_TOKENS, ANSWER_TOKENS = 2048, 1024
SERVER_GB = 1.0
BUDGET_S, GRACE_S = 2.0, 0.05
FAULT_EVERY_S = (2.0, 5.0)
PHASES = ("quiet", "faulty", "quiet")


class Restartable:
    """A server on one port, however often it is killed."""

    def __init__(self, folder: Path) -> None:
        self.port, http_port = common.free_port(), common.free_port()
        self._url = f"http://127.0.0.1:{http_port}/healthcheck"
        self._log = folder / "server.log"
        self._command = [sys.executable, "-m", "lmcache.server", "--port", str(self.port)]
        self._command += ["--http-port", str(http_port), "--l1-size-gb", f"{SERVER_GB:g}"]
        self.start()

    def start(self) -> None:
        """Start it, and wait for its first healthy answer."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        common.wait_for(self._url, self.process, self._log)

    def fault(self, source: random.Random) -> str:
        """Kill it and start it again, or stop it for a while; which of the two."""
        if source.random() < 0.5:
            self.process.kill()
            self.process.wait()
            time.sleep(source.uniform(0.0, 2.0))
            self.start()
            return "kill"
        self.process.send_signal(signal.SIGSTOP)
        time.sleep(source.uniform(0.1, 3.0))
        self.process.send_signal(signal.SIGCONT)
        return "stop"


class Answer:
    """One long answer after another; ``gaps_s`` between two of its tokens, with the phase they fell into."""

    def __init__(self, engine: VLLM) -> None:
        self._port = engine.port
        self.phase = "warm-up"
        self.gaps_s: dict[str, list[float]] = {name: [] for name in ("warm-up", *PHASES)}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        """End after the current answer."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        source = random.Random("the long answer")
        while not self._over.is_set():
            prompt = [source.randrange(2, 4000) for _ in range(64)]
            document = {"model": "m", "prompt": prompt, "max_tokens": ANSWER_TOKENS, "ignore_eos": True, "stream": True}
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=ANSWER_S)
            connection.request("POST", "/v1/completions", json.dumps(document), {"Content-Type": "application/json"})
            last = None
            for line in connection.getresponse():
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    if last is not None:
                        self.gaps_s[self.phase].append(now - last)
                    last = now
            connection.close()


def run(engine: VLLM, server: Restartable, num_faults: int) -> dict[str, Any]:
    """Gaps of the long answer and times to the first token, by phase, and what was done to the server."""
    source = random.Random("faults")
    known = [[source.randrange(2, 4000) for _ in range(PROMPT_TOKENS)] for _ in range(4)]
    answer = Answer(engine)
    firsts: dict[str, list[float]] = {name: [] for name in PHASES}
    done = {"kill": 0, "stop": 0}

    def ask(phase: str | None) -> None:
        for prompt in (source.choice(known), [source.randrange(2, 4000) for _ in range(PROMPT_TOKENS)]):
            first = engine.first(prompt)
            if phase is not None:
                firsts[phase].append(first.ttft_s)

    for prompt in known:
        engine.first(prompt)
    faulty_s = num_faults * (sum(FAULT_EVERY_S) / 2 + 1.5)
    for phase in PHASES:
        answer.phase = phase
        ends = time.monotonic() + (faulty_s if phase == "faulty" else faulty_s / 2)
        pest = threading.Thread(target=_pester, args=(server, num_faults, source.randrange(1 << 30), done))
        if phase == "faulty":
            pest.start()
        while time.monotonic() < ends or pest.is_alive():
            ask(phase)
    answer.close()
    return {"gaps_s": {name: answer.gaps_s[name] for name in PHASES}, "first_s": firsts, "faults": done}


def _pester(server: Restartable, num_faults: int, seed: int, done: dict[str, int]) -> None:
    source = random.Random(seed)
    for _ in range(num_faults):
        time.sleep(source.uniform(*FAULT_EVERY_S))
        done[server.fault(source)] += 1


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--faults", type=int, default=8, help="kills and stops of the server (default 8)")
    parser.add_argument("--model", type=Path, help="folder of the small model; made when missing")
    args = parser.parse_args()
    report = common.Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(args.model or folder / "small-llama")
        server = Restartable(folder)
        try:
            with VLLM(sys.executable, model, folder / "vllm.log", transfer_config(server.port)) as engine:
                result = run(engine, server, args.faults)
        finally:
            common.stop(server.process)
    note = f"{result['faults']['kill']} kills, {result['faults']['stop']} stops"
    for what, key, bound_s in (
        ("first token", "first_s", BUDGET_S + GRACE_S),
        ("step of the engine", "gaps_s", GRACE_S),
    ):
        faulty, quiet = (common.spread(result[key][phase], 1e3) for phase in ("faulty", "quiet"))
        figures = {"ours, server failing": faulty, "ours, server well": quiet}
        later_ms = faulty["max"] - quiet["max"]
        row = Row(f"{what}, server failing", "ms", figures, later_ms, "worst - worst, ms", bound_s * 1e3, note=note)
        report.add(row)
    return report.end(args.json, result)


if __name__ == "__main__":
    sys.exit(main())
