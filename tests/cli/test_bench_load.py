"""When requests are sent: closed and open loop, on a clock of the test's own where time matters."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache_cli.bench import load
from lmcache_cli.bench.arrivals import arrivals
from lmcache_cli.bench.base import CANCELLED, Failure, Listed, Outcome, Pacing, Request
from lmcache_cli.bench.load import LATE_S_MAX, drive
from lmcache_cli.bench.workloads.multi_round_chat import Sessions


class Ticking:
    """A clock that moves only when somebody sleeps on it."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._ids = itertools.count()

    def __call__(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._sleepers.append((self.now_s + max(seconds, 0.0), next(self._ids), future))
        await future

    async def run(self, work: Awaitable[Counter[str]]) -> Counter[str]:
        """Carry ``work`` to its end, moving the clock to the next sleeper whenever everybody waits."""
        task = asyncio.ensure_future(work)
        while not task.done():
            for _ in range(20):
                await asyncio.sleep(0)
            live = sorted(entry for entry in self._sleepers if not entry[2].done())
            if live and not task.done():
                wake_s, _, future = live[0]
                self._sleepers = live[1:]
                self.now_s = max(self.now_s, wake_s)
                future.set_result(None)
        return await task


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.outcomes: list[Outcome] = []
        self.num_in_flight = 0
        self.most_in_flight = 0

    def say(self, _text: str) -> None:
        raise AssertionError("words are not the driver's")

    def begin(self, _phase: str, _num_requests: int | None) -> None:
        raise AssertionError("phases are not the driver's")

    def advance(self, _num_done: int) -> None:
        raise AssertionError("steps are not the driver's")

    def sent(self, _request: Request) -> None:
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)

    def done(self, outcome: Outcome) -> None:
        self.num_in_flight -= 1
        self.outcomes.append(outcome)


def requests(number: int) -> list[Request]:
    return [Request(f"r{index}", (), 1) for index in range(number)]


def engine(
    clock: Ticking, service_s: Callable[[Request], float]
) -> Callable[[Request, float | None], Awaitable[Outcome]]:
    async def send(request: Request, due_s: float | None) -> Outcome:
        sent_s = clock()
        failure = None
        try:
            await clock.sleep(service_s(request))
        except asyncio.CancelledError:
            failure = Failure(CANCELLED, "given up")
        return Outcome(request, sent_s if due_s is None else due_s, sent_s, clock(), failure=failure)

    return send


def run(source: object, pacing: Pacing, service_s: Callable[[Request], float]) -> tuple[Seen, Counter[str], Ticking]:
    clock, seen = Ticking(), Seen()
    work = drive(source, pacing, engine(clock, service_s), seen, clock=clock, sleep=clock.sleep)  # type: ignore[arg-type]
    return seen, asyncio.run(clock.run(work)), clock


@given(st.integers(1, 12), st.integers(0, 40), st.lists(st.floats(0.001, 5), min_size=40, max_size=40))
def test_a_closed_loop_keeps_so_many_in_flight_and_no_more(concurrency: int, number: int, times: list[float]) -> None:
    seen, unsent, _ = run(Listed(requests(number)), Pacing(concurrency=concurrency), lambda r: times[int(r.id[1:])])
    assert seen.most_in_flight == min(concurrency, number)
    assert sorted(o.request.id for o in seen.outcomes) == sorted(r.id for r in requests(number))
    assert not unsent
    # busy all the time: a request is sent at the very moment at which an earlier one ends
    ends = sorted(o.end_s for o in seen.outcomes)
    sent = sorted(o.sent_s for o in seen.outcomes)
    assert sent[concurrency:] == pytest.approx(ends[: max(number - concurrency, 0)])


def test_a_closed_loop_stops_sending_when_the_time_is_over_and_finishes_what_it_has() -> None:
    seen, _, _ = run(Listed(requests(100)), Pacing(concurrency=2, duration_s=3.5), lambda _: 1.0)
    assert len(seen.outcomes) == 8
    assert all(o.failure is None for o in seen.outcomes)


def test_an_open_loop_waits_for_nobody() -> None:
    seen, unsent, clock = run(Listed(requests(20)), Pacing(rate_per_s=10, arrival="constant"), lambda _: 50.0)
    assert seen.most_in_flight == 20
    assert not unsent
    assert [o.sent_s for o in seen.outcomes] == pytest.approx([100 + index / 10 for index in range(20)])
    assert clock.now_s == pytest.approx(100 + 1.9 + 50)


def test_after_a_stall_nothing_is_made_up_for() -> None:
    clock, seen = Ticking(), Seen()
    stalls = iter([0.0, 0.0, 1.0])  # the third sleep takes a second more than asked for: this process was held up

    async def sleep(seconds: float) -> None:
        await clock.sleep(seconds + next(stalls, 0.0))

    pacing = Pacing(rate_per_s=10, arrival="constant", duration_s=3)
    work = drive(Listed(requests(100)), pacing, engine(clock, lambda _: 0.01), seen, clock=clock, sleep=sleep)
    unsent = asyncio.run(clock.run(work))
    sent = sorted(o.sent_s for o in seen.outcomes)
    assert set(unsent) == {"late"}
    assert unsent["late"] >= 9
    assert len(sent) + unsent["late"] == 30
    assert all(o.sent_s - o.due_s <= LATE_S_MAX for o in seen.outcomes)
    gaps = [after - before for before, after in itertools.pairwise(sent)]
    assert sum(gap < 0.09 for gap in gaps) <= 1  # no burst


def test_a_busy_conversation_holds_up_no_other() -> None:
    source = Sessions([[], [], []], ["question"], 1)
    slow = {"s0_r0"}
    pacing = Pacing(rate_per_s=10, arrival="constant", duration_s=2)
    seen, unsent, _ = run(source, pacing, lambda r: 1.55 if r.id in slow else 0.01)
    assert (len(seen.outcomes), dict(unsent)) == (20, {})
    waiting = [o.request.id for o in seen.outcomes if 100.0 < o.sent_s < 101.55]
    assert not any(request_id.startswith("s0_") for request_id in waiting)


def test_where_all_conversations_are_busy_the_arrival_is_counted_and_not_made_up_for() -> None:
    source = Sessions([[]], ["question"], 1)
    seen, unsent, _ = run(source, Pacing(rate_per_s=10, arrival="constant", duration_s=1), lambda _: 0.45)
    assert len(seen.outcomes) == 2
    assert unsent == {"nothing_ready": 8}


def test_where_as_many_are_in_flight_as_may_be_the_arrival_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "IN_FLIGHT_MAX", 3)
    pacing = Pacing(rate_per_s=10, arrival="constant", duration_s=1)
    seen, unsent, _ = run(Listed(requests(100)), pacing, lambda _: 50.0)
    assert len(seen.outcomes) == 3
    assert unsent == {"in_flight_max": 7}


def test_cancelled_in_the_middle_it_reports_what_was_in_flight() -> None:
    async def cancelled() -> Seen:
        clock, seen = Ticking(), Seen()
        work = drive(Listed(requests(5)), Pacing(concurrency=2), engine(clock, lambda _: 9.0), seen, clock=clock)
        task = asyncio.ensure_future(work)
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return seen

    seen = asyncio.run(cancelled())
    ended = {o.request.id: o.failure and o.failure.cause for o in seen.outcomes}
    assert ended == {"r0": CANCELLED, "r1": CANCELLED}


def test_a_fault_of_the_sender_ends_the_run() -> None:
    async def send(_request: Request, _due_s: float | None) -> Outcome:
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        asyncio.run(drive(Listed(requests(3)), Pacing(concurrency=1), send, Seen()))


@given(st.integers(0, 2**32), st.floats(0.1, 1000))
def test_poisson_arrivals_have_their_rate_and_are_not_even(seed: int, rate_per_s: float) -> None:
    times = list(itertools.islice(arrivals("poisson", rate_per_s, seed), 2000))
    assert times == sorted(times)
    assert times[-1] == pytest.approx(2000 / rate_per_s, rel=0.2)
    gaps = [after - before for before, after in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    spread = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert spread / mean == pytest.approx(1.0, rel=0.25)
    assert times == list(itertools.islice(arrivals("poisson", rate_per_s, seed), 2000))


def test_a_burst_puts_all_of_a_second_at_its_start() -> None:
    assert list(itertools.islice(arrivals("burst", 3, 0), 7)) == [0, 0, 0, 1, 1, 1, 2]
    assert list(itertools.islice(arrivals("burst", 0.5, 0), 3)) == [0, 2, 4]
    assert list(itertools.islice(arrivals("burst", 0.07, 0), 8))[7] == 100
