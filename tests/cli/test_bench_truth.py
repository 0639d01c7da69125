"""What a run says of itself: when pieces arrived, how late it woke, what it did not send, how long it will take."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_runs
import pytest
from bench_runs import outcome
from scripted_engine import MODEL, Behaviour, ScriptedEngine

from lmcache_cli import render
from lmcache_cli.bench import estimate, summary
from lmcache_cli.bench.base import Estimate, Lag, Outcome, Pacing, Plan, Request
from lmcache_cli.bench.exchange import Exchange
from lmcache_cli.bench.lag import PERIOD_S, Ticker
from lmcache_cli.bench.report import report
from lmcache_cli.bench.stamped import AGE_S_MAX, StampedSocket
from lmcache_cli.bench.stream import measure
from lmcache_cli.target import Target

Run = Callable[..., Any]
HEAD = b"HTTP/1.1 200 OK\r\n\r\n"
PIECE = b'data: {"choices": [{"index": 0, "delta": {"content": "a"}}]}\n\n'


# --- arrivals


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's times of arrival are Linux's")
def test_an_arrival_is_not_later_because_the_loop_was_busy() -> None:
    with ScriptedEngine(Behaviour(texts=("a", "b", "c"), gap_s=0.02, first_s=0.05)) as engine:

        async def held_up() -> tuple[Outcome, float]:
            request = Request("r0", [{"role": "user", "content": "how are you"}], 16)
            sending = asyncio.ensure_future(measure(Target(engine.url), request, model=MODEL))
            while not await asyncio.to_thread(engine.asked):
                await asyncio.sleep(0.001)
            deadline_s = time.monotonic() + 30
            while engine.asked()[0].done_s is None:  # the loop stands still meanwhile
                assert time.monotonic() < deadline_s
            free_s = time.perf_counter()
            return await sending, free_s

        measured, free_s = asyncio.run(held_up())
        (asked,) = engine.asked()
    assert asked.done_s is not None
    assert (measured.failure, measured.text) == (None, "abc")
    assert measured.end_s < free_s
    assert measured.end_s >= asked.done_s
    assert all(wrote <= arrived < free_s for wrote, arrived in zip(asked.text_s, measured.text_s, strict=True))


def test_what_the_kernel_says_can_make_no_arrival_earlier_than_the_one_before() -> None:
    async def run() -> list[float]:
        ages = iter([0.0, 0.0, 90.0, 0.0])
        clock = iter([100.0, 101.0, 102.0, 103.0, 104.0, 104.0])
        exchange = Exchange("http://engine", 1e6, lambda: next(clock), lambda: next(ages))
        for part in (HEAD, PIECE, PIECE, PIECE):
            exchange.get_buffer(-1)[: len(part)] = part
            exchange.buffer_updated(len(part))
        return exchange.text_s

    assert asyncio.run(run()) == [101.0, 101.0, 103.0]


def test_an_age_that_cannot_be_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = socket.socketpair()
    with left, right, StampedSocket(fileno=left.detach()) as ours:
        ours.ask_for_stamps()
        right.send(b"ab")
        buffer = bytearray(8)
        assert (ours.recv_into(buffer, 1), ours.recv_into(buffer)) == (1, 1)
        assert ours.age_s() >= 0
        now_ns = time.time_ns()
        monkeypatch.setattr(time, "time_ns", lambda: now_ns)
        for age_s, known_s in ((-5.0, 0.0), (AGE_S_MAX + 1, 0.0), (2.0, 2.0)):
            monkeypatch.setattr(ours, "_stamp_ns", now_ns - int(age_s * 1e9))
            assert ours.age_s() == known_s


# --- the loop's own lateness


def test_a_loop_that_stands_still_is_seen_even_if_the_ticker_ends_with_it() -> None:
    async def run() -> tuple[Lag | None, Lag | None, Lag | None]:
        at_once = Ticker().stop()
        ticker = Ticker()
        for _ in range(5):
            await asyncio.sleep(PERIOD_S)
        time.sleep(0.2)
        ended_in_it = ticker.stop()
        ticker = Ticker()
        time.sleep(0.2)
        await asyncio.sleep(PERIOD_S)
        return at_once, ended_in_it, ticker.stop()

    at_once, ended_in_it, after_it = asyncio.run(run())
    assert at_once is None
    for lag in (ended_in_it, after_it):
        assert lag is not None
        assert lag.max_ms >= 180
        assert lag.p50_ms <= lag.p99_ms <= lag.max_ms + 0.1
    assert ended_in_it is not None
    assert ended_in_it.num >= 2


@pytest.mark.parametrize(("p99_ms", "noted"), [(4.9, False), (5.1, True)])
def test_a_benchmark_that_ran_too_late_says_so_in_one_line(p99_ms: float, noted: bool) -> None:
    run = bench_runs.run(bench_runs.four(), loop_lag=Lag(100, 0.1, p99_ms, 12.0))
    numbers = summary.summarise(run, None)
    assert numbers["loop_lag_ms"] == {"num": 100, "p50": 0.1, "p99": p99_ms, "max": 12.0}
    assert ("ran_late" in [note["code"] for note in numbers["notes"]]) == noted
    lines = render.render(report(numbers), "terminal").splitlines()
    assert " Lateness of the Benchmark Itself (ms) ".center(56, "-") in lines
    assert f"{'Max:':<51}12.00" in lines
    assert sum("the benchmark itself ran late" in line for line in lines) == noted


def test_a_run_that_measured_nothing_has_no_lateness() -> None:
    numbers = summary.summarise(bench_runs.run([]), None)
    assert numbers["loop_lag_ms"] is None
    assert "Lateness of the Benchmark" not in render.render(report(numbers), "terminal")


# --- what was not sent


def test_unsent_requests_are_told_by_their_reasons() -> None:
    numbers = summary.summarise(bench_runs.run(bench_runs.four(), unsent={"late": 4, "time_over": 3}), None)
    assert numbers["num_requests"]["unsent"] == 7
    counts = {"late": 4, "in_flight_max": 0, "nothing_ready": 0, "time_over": 3, "interrupted": 0}
    assert numbers["unsent"] == counts
    lines = render.render(report(numbers), "terminal").splitlines()
    assert f"{'Unsent requests:':<55}7" in lines
    assert f"{'... their time was over:':<55}4" in lines
    assert f"{'... the duration was over:':<55}3" in lines
    assert not any("nothing was ready" in line for line in lines)


# --- the estimate


@pytest.mark.parametrize(
    ("pacing", "num_requests", "duration_s", "basis"),
    [
        (Pacing(rate_per_s=4), 100, 25.0, "rate"),
        (Pacing(rate_per_s=4, duration_s=60), 100, 25.0, "rate"),
        (Pacing(rate_per_s=4, duration_s=20), 100, 20.0, "duration"),
        (Pacing(rate_per_s=4, duration_s=20), None, 20.0, "duration"),
        (Pacing(concurrency=2, duration_s=20), 100, 20.0, "duration"),
        (Pacing(concurrency=2), 100, None, "none"),
        (Pacing(concurrency=100), 100, None, "none"),
    ],
)
def test_before_a_run_only_its_pacing_says_how_long_it_takes(
    pacing: Pacing, num_requests: int | None, duration_s: float | None, basis: str
) -> None:
    found = estimate.before(pacing, Plan(num_requests, 0, None, 0, None))
    assert (found.duration_s, found.basis) == (duration_s, basis)
    assert found.reason


def test_a_closed_loop_is_estimated_once_from_as_many_requests_as_are_in_flight() -> None:
    each = [outcome(str(index), 0.0, [1.0], 1.5 + index) for index in range(5)]  # 1.5, 2.5, ... s
    found = [estimate.after(Pacing(concurrency=4), Plan(20, 0, None, 0, None), each[:num]) for num in range(6)]
    assert [one is not None for one in found] == [False, False, False, False, True, False]
    assert found[4] is not None
    assert (found[4].duration_s, found[4].basis) == (20 * 3.0 / 4, "first_requests")


@pytest.mark.parametrize(
    ("pacing", "num_requests", "is_failed"),
    [
        (Pacing(concurrency=4), 4, False),
        (Pacing(concurrency=4), None, False),
        (Pacing(concurrency=4), 20, True),
        (Pacing(concurrency=4, duration_s=9), 20, False),
        (Pacing(rate_per_s=4), 20, False),
    ],
)
def test_where_the_first_requests_tell_nothing_there_is_no_estimate(
    pacing: Pacing, num_requests: int | None, is_failed: bool
) -> None:
    failure = ("http_503", "busy") if is_failed else None
    each = [outcome(str(index), 0.0, [1.0], 2.0, failure=failure) for index in range(4)]
    assert estimate.after(pacing, Plan(num_requests, 0, None, 0, None), each) is None


def test_a_run_tells_its_estimate_its_lateness_and_what_they_came_from(lmcache: Run, tmp_path: Path) -> None:
    words = ("--workload", "random-prefill", "--rp-request-length", "60", "--rp-num-requests", "6")
    with ScriptedEngine(Behaviour(first_s=0.05)) as engine:
        common = ("bench", "engine", "--engine-url", engine.url, *words, "--concurrency", "1")
        plan = json.loads(lmcache(*common, "--dry-run", "--format", "json").out)["metrics"]["plan"]
        ended = lmcache(*common, "--output-dir", str(tmp_path), "--format", "json")
        assert len(engine.asked()) == 6  # nothing is sent for the estimate
    assert (plan["estimated_s"], "known after 3 requests" in plan["estimated_from"]) == (None, True)
    metrics = json.loads(ended.out)["metrics"]
    (folder,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    first_s = [line["end_s"] - line["sent_s"] for line in lines[:3]]
    found = Estimate(**metrics["estimate"])
    assert (found.basis, found.duration_s) == ("first_requests", pytest.approx(6 * sum(first_s) / 3, rel=1e-3))
    assert f"estimated time: {found.duration_s:.3g} s (6 requests, 1 in flight, if each takes " in ended.err
    assert metrics["loop_lag_ms"]["num"] > 0
    assert metrics["loop_lag_ms"]["max"] >= metrics["loop_lag_ms"]["p50"] >= 0
