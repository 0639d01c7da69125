"""Two runs compared, and several runs in one table."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_runs
import pytest
from bench_runs import outcome

from lmcache_cli import render
from lmcache_cli.bench import rundir, summary, sweep
from lmcache_cli.bench.base import Outcome, Pacing
from lmcache_cli.bench.compare import METRICS, compare, interval
from lmcache_cli.bench.compare import report as compare_report
from lmcache_cli.bench.rundir import MEASURED, RunFolder, StoredRun, load_run
from lmcache_cli.errors import UsageFault


def stored(outcomes: Sequence[Outcome], name: str = "run", **config: Any) -> StoredRun:
    return StoredRun(name, {**bench_runs.CONFIG, **config}, None, [], outcomes)


def requests(ttft_s: Sequence[float], slower_s: float = 0.0) -> list[Outcome]:
    """Requests of four texts, 10 ms apart, one after another."""
    found = []
    clock = 0.0
    for i, ttft in enumerate(ttft_s):
        first = clock + ttft + slower_s
        found.append(outcome(f"r{i}", clock, [first + k * 0.01 for k in range(4)], first + 0.04))
        clock = first + 0.05
    return found


def spread(seed: int, num: int = 200) -> list[float]:
    draw = random.Random(seed)
    return [0.1 + draw.random() * 0.1 for _ in range(num)]


def test_the_same_run_twice_shows_no_difference() -> None:
    result = compare(stored(requests(spread(1))), stored(requests(spread(1))), 5)
    assert result["ttft_ms"]["difference"] == 0
    assert {result[f"{metric}_ms"]["verdict"] for metric in METRICS} == {"no difference shown"}
    assert result["is_worse"] is False


def test_a_constant_difference_is_found_although_the_requests_differ_much_more() -> None:
    result = compare(stored(requests(spread(1))), stored(requests(spread(1), 0.02)), 5)
    ttft = result["ttft_ms"]
    assert (ttft["difference"], ttft["low"], ttft["high"]) == pytest.approx((20, 20, 20))
    assert ttft["percent"] == pytest.approx(2000 / ttft["mean_a"])
    assert (ttft["verdict"], result["tpot_ms"]["verdict"]) == ("worse", "no difference shown")
    assert result["worse"] == ["ttft", "e2e"]
    assert result["throughput"]["requests_per_s"]["difference"] < 0


def test_a_difference_below_the_threshold_is_told_but_fails_nothing() -> None:
    result = compare(stored(requests(spread(1))), stored(requests(spread(1), 0.02)), 50)
    assert result["ttft_ms"]["verdict"] == "worse"
    assert result["is_worse"] is False
    assert compare_report(result).failure is None


def test_a_faster_b_is_better() -> None:
    result = compare(stored(requests(spread(1), 0.02)), stored(requests(spread(1))), 5)
    assert result["ttft_ms"]["verdict"] == "better"
    assert result["is_worse"] is False


def test_noise_alone_shows_no_difference() -> None:
    result = compare(stored(requests(spread(1))), stored(requests(spread(2))), 0)
    assert result["ttft_ms"]["low"] < 0 < result["ttft_ms"]["high"]
    assert result["ttft_ms"]["verdict"] == "no difference shown"


def test_the_interval_is_that_of_the_normal_law_where_there_are_many_values() -> None:
    draw = random.Random(3)
    bounds = interval([draw.gauss(5, 2) for _ in range(400)])
    assert bounds is not None
    low, high = bounds
    assert low < 5 < high
    assert (high - low) / 2 == pytest.approx(1.96 * 2 / 20, rel=0.1)


def test_one_pair_has_no_interval_and_no_verdict_but_a_note() -> None:
    assert interval([1.0]) is None
    result = compare(stored(requests([0.1])), stored(requests([9.9])), 5)
    assert (result["ttft_ms"]["low"], result["is_worse"]) == (None, False)
    assert result["ttft_ms"]["verdict"] == "no difference shown"
    assert [note["code"] for note in result["notes"]][:1] == ["few_pairs"]


def test_only_requests_that_succeeded_in_both_are_compared_and_the_others_are_counted() -> None:
    a, b = requests(spread(1, 20)), requests(spread(1, 20))
    b[3] = outcome("r3", 0.0, [], 1.0, failure=("timeout", "no answer"))
    b[4] = outcome("r4", 0.0, [], 1.0, failure=("cancelled", "the run ended"))
    result = compare(stored(a[:19]), stored(b[1:]), 50)
    assert result["pairs"] == {"num": 16, "failed_in_a": 0, "failed_in_b": 1, "only_in_a": 2, "only_in_b": 1}


def test_more_failures_than_the_threshold_allows_make_b_worse() -> None:
    a, b = requests(spread(1, 20)), requests(spread(1, 20))
    b[3] = outcome("r3", 0.0, [], 1.0, failure=("timeout", "no answer"))
    assert compare(stored(a), stored(b), 5)["worse"] == []
    assert compare(stored(a), stored(b), 4)["worse"] == ["failures"]
    failure = compare_report(compare(stored(a), stored(b), 4)).failure
    assert failure is not None
    assert failure.message == "B is worse by more than 4 %: failed requests 1 against 0"


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"workload": "random-prefill", "rp_num_requests": 3}, "workload is 'long-doc-qa'"),
        ({"seed": 43}, "seed is 42 in a and 43 in b"),
        ({"ldqa_document_length": 99}, "ldqa_document_length is 100"),
    ],
)
def test_runs_that_asked_something_else_are_refused_in_one_sentence(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageFault, match=said):
        compare(stored(requests([0.1]), "a"), stored(requests([0.1]), "b", **config), 5)


def test_another_engine_or_another_load_may_be_compared_and_the_load_is_noted() -> None:
    a = stored(requests([0.1]), concurrency=1)
    result = compare(a, stored(requests([0.1]), concurrency=8, engine_url="http://other:1"), 5)
    assert "the load was not the same in A and B: concurrency 1 and 8" in [note["message"] for note in result["notes"]]


def test_runs_without_a_common_request_are_refused() -> None:
    other = [outcome("other", 0.0, [1.0], 1.0)]
    with pytest.raises(UsageFault, match="no request in common"):
        compare(stored(requests([0.1])), stored(other), 5)


def kept(folder: Path, outcomes: Sequence[Outcome], seed: int = 42) -> str:
    place = RunFolder(str(folder), "long-doc-qa", {**bench_runs.CONFIG, "seed": seed})
    for each in outcomes:
        place.record(each, MEASURED)
    run = bench_runs.run(outcomes)
    assert place.finish([], outcomes, summary.summarise(run, None), lambda: "") is None
    return str(place.path)


@pytest.fixture
def compare_command(process: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *words: process("bench", "compare", *words)


def test_the_command_exits_1_where_b_is_worse_and_0_where_it_is_not(
    tmp_path: Path, compare_command: Callable[..., Any]
) -> None:
    a, b = kept(tmp_path, requests(spread(1))), kept(tmp_path, requests(spread(1), 0.02))
    worse = compare_command(a, b, "--format", "json")
    document = json.loads(worse.out)
    assert (worse.status, document["error"]["code"]) == (1, "worse")
    assert document["metrics"]["ttft_ms"]["difference"] == pytest.approx(20, abs=0.01)
    assert worse.err.startswith("lmcache: B is worse by more than 5 %: ttft ")
    fine = compare_command(a, b, "--threshold", "80", "--output", str(tmp_path / "out"))
    assert (fine.status, fine.err) == (0, "")
    assert fine.out == (tmp_path / "out").read_text()
    assert fine.out.splitlines()[0] == " Engine Benchmark Comparison (B against A) ".center(64, "=")


def test_the_command_refuses_what_is_no_run_or_another_run_with_exit_2(
    tmp_path: Path, compare_command: Callable[..., Any]
) -> None:
    a, b = kept(tmp_path, requests([0.1])), kept(tmp_path, requests([0.1]), seed=1)
    for words in ((a, b), (a, str(tmp_path)), (a, a, "--threshold", "nan"), (a,)):
        refused = compare_command(*words)
        assert refused.status == 2
        assert refused.err.startswith("lmcache")
        assert refused.err.count("\n") == 1


def test_a_run_that_was_killed_can_be_compared_and_that_is_noted(tmp_path: Path) -> None:
    a = kept(tmp_path, requests(spread(1)))
    b = kept(tmp_path, requests(spread(1)))
    (Path(b) / rundir.SUMMARY).unlink()
    result = compare(load_run(a), load_run(b), 5)
    assert "run B did not come to its end" in [note["message"] for note in result["notes"]]
    assert render.render(compare_report(result), "terminal").count("Note:") == len(result["notes"])


@pytest.mark.parametrize(
    ("text", "kind", "points"),
    [("1,2,4", sweep.CONCURRENCY, (1, 2, 4)), ("0.5, 2", sweep.RATE, (0.5, 2.0)), ("8", sweep.CONCURRENCY, (8,))],
)
def test_points_read_in_the_order_given(text: str, kind: str, points: tuple[float, ...]) -> None:
    assert sweep.parse_points("--x", text, kind) == points


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", sweep.RATE),
        ("1,,2", sweep.RATE),
        ("1,1.0", sweep.RATE),
        ("nan", sweep.RATE),
        ("inf", sweep.RATE),
        ("-1", sweep.RATE),
        ("1.5", sweep.CONCURRENCY),
        ("0", sweep.CONCURRENCY),
        (",".join(map(str, range(1, 102))), sweep.CONCURRENCY),
    ],
)
def test_points_that_do_not_read_are_refused_in_one_sentence(text: str, kind: str) -> None:
    with pytest.raises(UsageFault, match=r"^--points"):
        sweep.parse_points("--points", text, kind)


def swept() -> dict[str, Any]:
    runs = []
    for value, sent_s in ((1.0, [0.0, 1.0, 2.0]), (2.0, [0.0, 1.0, 2.0])):
        due_s = [i / value for i in range(3)]
        times = enumerate(zip(sent_s, due_s, strict=True))
        each = [outcome(f"{i}", sent, [sent + 0.1], sent + 0.2, due_s=due) for i, (sent, due) in times]
        run = bench_runs.run(each, pacing=Pacing(rate_per_s=value))
        runs.append((value, f"run-{value:g}", summary.summarise(run, None)))
    return sweep.sweep_summary(sweep.RATE, runs)


def test_a_sweep_is_one_table_with_a_row_a_point() -> None:
    lines = render.render(sweep.report(swept()), "terminal").splitlines()
    (head,) = [line for line in lines if line.startswith("Rate (req/s):")]
    rows = [line for line in lines if line.startswith(("1:", "2:"))]
    assert {len(head), *map(len, rows)} == {86}
    assert rows[1].split() == ["2:", "1.00", "1.36", "1.36", "100.00", "100.00", "N/A", "0"]
    assert "the load fell behind at 2 requests/s" in lines[-2]


def test_the_json_form_of_a_sweep_holds_all_of_its_document() -> None:
    numbers = swept()
    assert json.loads(render.render(sweep.report(numbers), "json"))["metrics"] == json.loads(json.dumps(numbers))
