"""The connectors' asking side under the crash harness, a process: ``harness_session.py PORT SEED``.

The real ``Link`` and ``SchedulerSession`` ask for prompts as an engine's scheduler does, between steps of a
millisecond. Until standard input ends; then the distribution of how long calls and questions took is printed as JSON.
"""

from __future__ import annotations

import json
import logging
import random
import resource
import select
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from harness_engine import NUM_PROMPTS, PROMPT_CHUNKS
from server_running import key

from lmcache.connectors.link import Address, Link
from lmcache.connectors.session import LOOKUP_S, PROMOTION_S, Question, SchedulerSession
from lmcache.wire import messages as m

STEP_S = 0.001
LEASED_S = 0.05


class Clocked:
    """Calls of the session, timed."""

    def __init__(self, session: SchedulerSession) -> None:
        self.session = session
        self.calls_ms: list[float] = []
        self.waited_ms: dict[str, float] = {}  # by method: the longest call that gave its processor up by itself
        self.questions_ms: list[float] = []
        self.num_answers = self.num_misses = self.num_unasked = 0

    def call(self, method: str, *arguments: object) -> object:
        """One method of the session."""
        switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        started = time.monotonic()
        result = getattr(self.session, method)(*arguments)
        spent_ms = (time.monotonic() - started) * 1000
        self.calls_ms.append(spent_ms)
        if resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw > switches:
            self.waited_ms[method] = max(spent_ms, self.waited_ms.get(method, 0.0))
        return result

    def ask(self, keys: list[bytes], is_cancelled: bool) -> None:
        """One prompt, from the question to its end."""
        started = time.monotonic()
        question = self.call("ask", keys)
        if not isinstance(question, Question):
            self.num_unasked += 1
            time.sleep(STEP_S * 10)
            return
        while not self.call("poll", question):
            if is_cancelled:
                self.call("cancel", question)
                return
            time.sleep(STEP_S)
        self.questions_ms.append((time.monotonic() - started) * 1000)
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
    clocked.session.close()
    budget_ms = (LOOKUP_S + PROMOTION_S) * 1000
    print(
        json.dumps(
            {
                "calls": len(clocked.calls_ms),
                "calls_ms": percentiles(clocked.calls_ms),
                "waited_ms": clocked.waited_ms,
                "questions": len(clocked.questions_ms),
                "questions_ms": percentiles(clocked.questions_ms),
                "budget_ms": budget_ms,
                "late": sum(spent > budget_ms + 50 for spent in clocked.questions_ms),
                "slow_calls": sum(spent > 50 for spent in clocked.calls_ms),
                "answers": clocked.num_answers,
                "misses": clocked.num_misses,
                "unasked": clocked.num_unasked,
            }
        ),
        flush=True,
    )


def registration(_: int) -> m.Register:
    """A scheduler of the engines' model."""
    return m.Register(0, "scheduler", "tiny", "mock 1", 0, 1, 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
