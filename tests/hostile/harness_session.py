"""The connectors' asking side under the crash harness, a process: ``harness_session.py PORT SEED``.

The real ``Link`` and ``SchedulerSession`` ask for prompts as an engine's scheduler does, between steps of a
millisecond. Until standard input ends; then the distribution of how long calls and questions took is printed as JSON.
Beside the time that passed stands that time without what the thread spent ready to run while others had its processor
(``own``): a wait of ours is in both, a busy machine in the first only.
"""

from __future__ import annotations

import json
import logging
import os
import random
import select
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from harness_engine import NUM_PROMPTS, PROMPT_CHUNKS
from server_running import key

from lmcache.connectors.link import Address, Link
from lmcache.connectors.session import BUDGET_S, Question, SchedulerSession
from lmcache.wire import messages as m

STEP_S = 0.001
LEASED_S = 0.05
LATE_MS = 50.0


class Runqueue:
    """How long the calling thread has been ready to run and was not run, by the kernel's account."""

    def __init__(self) -> None:
        self._file = os.open(f"/proc/self/task/{threading.get_native_id()}/schedstat", os.O_RDONLY | os.O_CLOEXEC)

    def waited_ms(self) -> float:
        """Since the thread began."""
        return int(os.pread(self._file, 96, 0).split()[1]) / 1e6


class Clocked:
    """Calls of the session, timed."""

    def __init__(self, session: SchedulerSession) -> None:
        self.session = session
        self.calls_ms: dict[str, list[float]] = {}
        self.own_calls_ms: dict[str, list[float]] = {}
        self.questions_ms: list[float] = []
        self.own_questions_ms: list[float] = []
        self.num_answers = self.num_misses = self.num_unasked = self.num_cancelled = 0
        self._runqueue = Runqueue()

    def call(self, method: str, *arguments: object) -> object:
        """One method of the session."""
        queued_ms = self._runqueue.waited_ms()
        started = time.monotonic()
        result = getattr(self.session, method)(*arguments)
        spent_ms = (time.monotonic() - started) * 1000
        self.calls_ms.setdefault(method, []).append(spent_ms)
        own_ms = spent_ms - (self._runqueue.waited_ms() - queued_ms)
        self.own_calls_ms.setdefault(method, []).append(max(0.0, own_ms))
        return result

    def ask(self, keys: list[bytes], is_cancelled: bool) -> None:
        """One prompt, from the question to its end."""
        started = time.monotonic()
        question = self.call("ask", keys)
        if not isinstance(question, Question):
            self.num_unasked += 1
            time.sleep(STEP_S * 10)
            return
        queued_ms = self._runqueue.waited_ms()
        while not self.call("poll", question):
            if is_cancelled:
                self.call("cancel", question)
                self.num_cancelled += 1
                return
            queued_ms = self._runqueue.waited_ms()
            time.sleep(STEP_S)
        spent_ms = (time.monotonic() - started) * 1000
        self.questions_ms.append(spent_ms)
        # Only the last step can have made it late: before, the deadline had not come.
        self.own_questions_ms.append(spent_ms - (self._runqueue.waited_ms() - queued_ms))
        prefix = question.answer
        if prefix is None:
            self.num_misses += 1
            return
        self.num_answers += 1
        time.sleep(LEASED_S * random.random())
        self.call("release", prefix)


def percentiles(values: list[float]) -> dict[str, float]:
    """Some of them, and the worst."""
    ordered = sorted(values) or [0.0]
    places = {"p50": 0.5, "p99": 0.99, "p999": 0.999, "max": 1.0}
    return {name: round(ordered[min(len(ordered) - 1, int(len(ordered) * place))], 3) for name, place in places.items()}


def main(port: int, seed: int) -> None:
    """Ask until told to stop."""
    logging.disable(logging.CRITICAL)
    source = random.Random(seed)
    link = Link(Address("127.0.0.1", port), "harness scheduler", False, registration)
    clocked = Clocked(SchedulerSession(link))
    link.wait_first_try(5.0)
    print("ready", flush=True)
    while not select.select([sys.stdin], [], [], 0)[0]:
        start = source.randrange(NUM_PROMPTS)
        clocked.ask([key((start, number)) for number in range(PROMPT_CHUNKS)], source.random() < 0.1)
        clocked.call("pump")
        if source.random() < 0.01:
            clocked.call("register_again")
    clocked.session.close()
    print(json.dumps(seen(clocked)), flush=True)


def seen(clocked: Clocked) -> dict[str, object]:
    """What is printed."""
    calls_ms = [spent for of_method in clocked.calls_ms.values() for spent in of_method]
    own_ms = [spent for of_method in clocked.own_calls_ms.values() for spent in of_method]
    late_ms = BUDGET_S * 1000 + LATE_MS
    return {
        "calls": len(calls_ms),
        "calls_ms": percentiles(calls_ms),
        "own_calls_ms": percentiles(own_ms),
        "slowest_ms": {method: round(max(spent), 3) for method, spent in clocked.calls_ms.items()},
        "own_slowest_ms": {method: round(max(spent), 3) for method, spent in clocked.own_calls_ms.items()},
        "slow_calls": sum(spent > LATE_MS for spent in calls_ms),
        "own_slow_calls": sum(spent > LATE_MS for spent in own_ms),
        "questions": len(clocked.questions_ms),
        "questions_ms": percentiles(clocked.questions_ms),
        "own_questions_ms": percentiles(clocked.own_questions_ms),
        "late": sum(spent > late_ms for spent in clocked.questions_ms),
        "own_late": sum(spent > late_ms for spent in clocked.own_questions_ms),
        "answers": clocked.num_answers,
        "misses": clocked.num_misses,
        "cancelled": clocked.num_cancelled,
        "unasked": clocked.num_unasked,
    }


def registration(_: int) -> m.Register:
    """A scheduler of the engines' model."""
    return m.Register(0, "scheduler", "tiny", "mock 1", 0, 1, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
