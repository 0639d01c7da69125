"""The numbers of a run, and the folder that they are kept in."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_runs
import pytest
from bench_runs import outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_cli import render
from lmcache_cli.bench import rundir, summary
from lmcache_cli.bench.base import Outcome, Pacing, Run
from lmcache_cli.bench.report import report
from lmcache_cli.bench.rundir import MEASURED, WARMUP, RunFolder, load_run
from lmcache_cli.errors import UsageFault

NOTHING = dict.fromkeys(("mean", "p50", "p90", "p99", "max"))


def summarised(run: Run, goodput: str | None = None) -> dict[str, Any]:
    return summary.summarise(run, None if goodput is None else summary.parse_goodput(goodput))


def close(**figures: float) -> Any:
    return pytest.approx(figures, rel=1e-6)


def codes(numbers: dict[str, Any]) -> list[str]:
    return [note["code"] for note in numbers["notes"]]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=2, max_size=50))
def test_percentiles_are_those_of_the_standard_library(values: list[float]) -> None:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    for percent in (1, 50, 90, 99):
        assert summary.percentile(sorted(values), percent) == pytest.approx(cuts[percent - 1], rel=1e-6, abs=1e-6)


def test_latencies_are_those_worked_out_by_hand() -> None:
    numbers = summarised(bench_runs.run(bench_runs.four()))
    assert numbers["ttft_ms"] == close(mean=1300 / 3, p50=200, p90=840, p99=984, max=1000)
    assert numbers["tpot_ms"] == close(mean=75, p50=75, p90=95, p99=99.5, max=100)
    assert numbers["itl_ms"] == close(mean=75, p50=75, p90=100, p99=100, max=100)
    assert numbers["e2e_ms"] == close(mean=600, p50=250, p90=1090, p99=1279, max=1300)


def test_throughput_is_taken_from_the_first_send_to_the_last_byte_of_any_request() -> None:
    numbers = summarised(bench_runs.run(bench_runs.four()))
    assert numbers["duration_s"] == 4.0
    assert numbers["tokens"] == {"input": 300, "output": 7}
    assert numbers["throughput"] == {
        "requests_per_s": 0.75,
        "input_tokens_per_s": 75.0,
        "output_tokens_per_s": 1.75,
        "total_tokens_per_s": 76.75,
    }


def test_requests_are_counted_by_how_they_ended() -> None:
    cancelled = outcome("e", 1003.0, [], 1004.0, failure=("cancelled", "given up"))
    numbers = summarised(bench_runs.run([*bench_runs.four(), cancelled], unsent={"late": 4, "time_over": 3}))
    assert numbers["num_requests"] == {"ok": 3, "failed": 1, "cancelled": 1, "unsent": 7}
    assert numbers["attempts"] == {"total": 6, "retries": 1}
    assert [(f["cause"], f["num"]) for f in numbers["failures"]] == [("http_503", 1)]


def test_failures_are_listed_by_cause_most_frequent_first_with_the_first_message_of_each() -> None:
    failures = [("timeout", "t1"), ("http_503", "h1"), ("http_503", "h2"), ("timeout", "t2"), ("http_503", "h3")]
    numbers = summarised(bench_runs.run([outcome(f"{i}", i, [], i + 1, failure=f) for i, f in enumerate(failures)]))
    assert numbers["failures"] == [
        {"cause": "http_503", "num": 3, "message": "h1"},
        {"cause": "timeout", "num": 2, "message": "t1"},
    ]


def test_cold_and_warm_requests_have_their_own_ttft() -> None:
    run = bench_runs.run(bench_runs.four())
    run.warmup = [outcome("w", 900.0, [902.0], 902.0, is_first=True), outcome("hello", 903.0, [903.1], 903.1)]
    numbers = summarised(run)
    assert numbers["ttft_cold_ms"] == {"num": 1, **close(mean=1000, p50=1000, p90=1000, p99=1000, max=1000).expected}
    assert numbers["ttft_warm_ms"]["num"] == 2
    assert numbers["ttft_warm_ms"]["mean"] == pytest.approx(150)
    assert (numbers["ttft_warmup_ms"]["num"], numbers["ttft_warmup_ms"]["mean"]) == (1, 2000)


def test_what_was_not_measured_is_null_and_not_zero() -> None:
    numbers = summarised(bench_runs.run([]))
    assert numbers["ttft_ms"] == numbers["tpot_ms"] == numbers["itl_ms"] == numbers["e2e_ms"] == NOTHING
    assert numbers["duration_s"] is None
    assert set(numbers["throughput"].values()) == {None}
    assert numbers["cache"] == {"cached_tokens": None, "share": None, "num_reporting": 0}
    printed = report(numbers)
    assert printed.failure is not None
    assert printed.failure.code == "nothing_measured"


def test_one_request_without_usage_makes_token_figures_unknown() -> None:
    outcomes = [*bench_runs.four()[:2], Outcome(bench_runs.four()[0].request, 1002.0, 1002.0, 1003.0, (1002.5,), "x")]
    numbers = summarised(bench_runs.run(outcomes), "tpot:60")
    assert numbers["tokens"] == {"input": None, "output": None}
    assert numbers["throughput"]["output_tokens_per_s"] is None
    assert numbers["throughput"]["requests_per_s"] == 1.0
    assert (numbers["cache"]["cached_tokens"], numbers["cache"]["share"]) == (80, None)
    assert numbers["goodput"]["num_requests"] is None
    assert "no_usage" in codes(numbers)


def test_cached_tokens_count_as_none_where_an_engine_that_reports_them_is_silent() -> None:
    cache = summarised(bench_runs.run(bench_runs.four()))["cache"]
    assert cache == {"cached_tokens": 120, "share": 0.4, "num_reporting": 2}


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ("ttft:150", 1),
        ("ttft:201", 2),
        ("ttft:2000 tpot:60", 2),  # one has a single token, so no TPOT to keep
        ("itl:60", 2),
        ("e2e:260,ttft:150", 1),
        ("e2e:10", 0),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(limits: str, good: int) -> None:
    goodput = summarised(bench_runs.run(bench_runs.four()), limits)["goodput"]
    assert (goodput["num_requests"], goodput["requests_per_s"], goodput["share"]) == (good, good / 4, good / 4)


@pytest.mark.parametrize(
    "text", ["", " ", "ttft", "ttft:", "ttft:x", "ttft:0", "ttft:-1", "ttft:nan", "ttft:inf", "p99:3", "ttft:1 ttft:2"]
)
def test_limits_that_do_not_read_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageFault, match=r"^--goodput") as refused:
        summary.parse_goodput(text)
    assert "\n" not in str(refused.value)


def open_loop(sent_s: list[float], due_s: list[float], rate: float, arrival: str = "constant") -> dict[str, Any]:
    outcomes = [
        outcome(f"{i}", s, [s + 0.1], s + 0.2, due_s=d) for i, (s, d) in enumerate(zip(sent_s, due_s, strict=True))
    ]
    return summarised(bench_runs.run(outcomes, pacing=Pacing(rate_per_s=rate, arrival=arrival)))


def test_a_load_that_keeps_its_schedule_is_not_behind() -> None:
    numbers = open_loop([0.001, 0.501, 1.001, 1.501], [0.0, 0.5, 1.0, 1.5], 2.0)
    assert (numbers["rate"]["scheduled_per_s"], numbers["rate"]["achieved_per_s"]) == (2.0, 2.0)
    assert numbers["rate"]["lateness_ms"] == close(mean=1, p50=1, p90=1, p99=1, max=1)
    assert numbers["rate"]["is_behind"] is False
    assert "fell_behind" not in codes(numbers)


def test_a_burst_of_each_second_has_the_rate_that_was_asked_for() -> None:
    due = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0]
    rate = open_loop(due, due, 3.0, "burst")["rate"]
    assert (rate["asked_per_s"], rate["achieved_per_s"]) == (3.0, 3.0)


def test_a_load_that_falls_behind_is_told_in_a_row_and_a_sentence() -> None:
    numbers = open_loop([0.0, 1.0, 2.0, 3.0], [0.0, 0.5, 1.0, 1.5], 2.0)
    assert (numbers["rate"]["achieved_per_s"], numbers["rate"]["is_behind"]) == (1.0, True)
    text = render.render(report(numbers), "terminal")
    assert "Fell behind:                                         yes\n" in text
    assert "the load fell behind: 1.00 requests/s were sent where 2 were asked for" in text


def test_a_closed_loop_has_no_rate_to_fall_behind() -> None:
    rate = summarised(bench_runs.run(bench_runs.four()))["rate"]
    assert (rate["asked_per_s"], rate["is_behind"], rate["lateness_ms"]) == (None, None, NOTHING)


def test_the_server_s_counters_are_told_before_after_and_between() -> None:
    before = {"lookup_requested_tokens": 100.0, "lookup_hit_tokens": 50.0}
    after = {"lookup_requested_tokens": 500.0, "lookup_hit_tokens": 350.0, "new": 1.0}
    numbers = summarised(bench_runs.run(bench_runs.four(), server_before=before, server_after=after))
    assert numbers["server"]["delta"] == {"lookup_requested_tokens": 400.0, "lookup_hit_tokens": 300.0}
    assert numbers["server"]["hit_ratio"] == 0.75
    assert "Hit rate (server):                                 75.0%\n" in render.render(report(numbers), "terminal")


def test_the_json_form_holds_the_whole_summary() -> None:
    run = bench_runs.run(
        bench_runs.four(), pacing=Pacing(rate_per_s=1.0), server_before={"x": 1.0}, server_after={"x": 2.0}
    )
    numbers = summarised(run, "ttft:500 tpot:50")
    document = json.loads(render.render(report(numbers), "json"))
    assert document["metrics"] == json.loads(json.dumps(numbers))
    assert set(document["metrics"]) == {*summary.KEYS, *summary.LIST_NAMES}
    assert document["error"]["code"] == "requests_failed"


def test_the_printed_report_has_the_width_and_the_sections_that_were_agreed() -> None:
    lines = render.render(report(summarised(bench_runs.run(bench_runs.four()))), "terminal").splitlines()
    assert lines[0] == " Engine Benchmark Result (long-doc-qa) ".center(56, "=")
    assert " Time to First Token (ms) ".center(56, "-") in lines
    assert f"{'P99:':<49} 984.00" in lines
    assert f"{'http_503:':<55}1" in lines
    assert lines[-1] == "=" * 56


def test_an_interrupted_run_is_marked() -> None:
    numbers = summarised(bench_runs.run(bench_runs.four()[:3], is_interrupted=True))
    assert numbers["is_interrupted"] is True
    assert codes(numbers) == ["interrupted"]
    failure = report(numbers).failure
    assert failure is not None
    assert failure.code == "interrupted"


def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path), "long-doc-qa", bench_runs.CONFIG)


def test_a_run_comes_back_from_its_folder_as_it_was_measured(tmp_path: Path) -> None:
    run = bench_runs.run(bench_runs.four())
    run.warmup = [outcome("w", 990.0, [991.0], 991.5, is_first=True)]
    place = folder(tmp_path)
    for each in run.warmup:
        place.record(each, WARMUP)
    for each in reversed(run.outcomes):
        place.record(each, MEASURED)
    half = load_run(str(place.path))
    assert (len(half.warmup), len(half.outcomes), half.summary) == (1, 4, None)
    numbers = summarised(run)
    assert place.finish(run.warmup, run.outcomes, numbers, lambda: "<html>") is None
    whole = load_run(str(place.path))
    assert whole.summary == json.loads(json.dumps(numbers))
    assert [o.request.id for o in whole.outcomes] == ["a", "b", "c", "d"]
    assert [o.sent_s for o in (*whole.warmup, *whole.outcomes)] == [0.0, 10.0, 11.5, 12.0, 13.0]
    again = summarised(bench_runs.run(whole.outcomes))
    for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "throughput", "failures", "attempts", "cache"):
        assert (
            again[key] == pytest.approx(numbers[key]) if isinstance(numbers[key], dict) else again[key] == numbers[key]
        )
    assert sorted(file.name for file in place.path.iterdir()) == [
        *("config.json", "report.html", "requests.jsonl", "summary.json"),
    ]


def test_answers_and_prompts_are_not_stored(tmp_path: Path) -> None:
    place = folder(tmp_path)
    place.record(bench_runs.four()[0], MEASURED)
    place.close()
    line = json.loads((place.path / rundir.REQUESTS).read_text())
    assert (line["num_answer_chars"], line["num_prompt_chars"], line["version"]) == (13, 8, 1)
    assert "secret" not in json.dumps(line)


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    places = [folder(tmp_path) for _ in range(3)]
    for place in places:
        place.close()
    assert len({place.path for place in places}) == 3
    assert all(json.loads((p.path / rundir.CONFIG).read_text())["ldqa_document_length"] == 100 for p in places)


def test_a_folder_that_cannot_be_made_is_refused_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageFault, match="cannot write --output-dir"):
        folder(tmp_path / "file")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


FULL_DISK = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import bench_runs
from lmcache_cli.bench import rundir, summary
run = bench_runs.run(bench_runs.four())
place = rundir.RunFolder(sys.argv[1], "long-doc-qa", run.config)
place.record(run.outcomes[0], rundir.MEASURED)
room = (place.path / rundir.REQUESTS).stat().st_size + 20  # a second line does not fit
resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
for outcome in run.outcomes[1:]:
    place.record(outcome, rundir.MEASURED)
problem = place.finish([], run.outcomes, summary.summarise(run, None), lambda: "x" * 100000)
print(place.path, len(rundir.load_run(str(place.path)).outcomes), sorted(p.name for p in place.path.iterdir()))
print(problem)
"""


def test_a_disk_without_room_costs_no_line_that_was_written_and_is_told_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    first, problem = done.stdout.splitlines()
    path = next(tmp_path.iterdir())
    assert first == f"{path} 1 ['config.json', 'requests.jsonl']"
    assert problem == f"cannot write summary.json and requests.jsonl and report.html in {path}: File too large"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "[1]", "not a JSON object"),
        ("config.json", "{", "cannot read"),
        ("config.json", '{"version": 2}', "version 1 is understood"),
        ("summary.json", "[" * 100_000, "cannot read"),
        ("requests.jsonl", None, "has no requests.jsonl"),
        ("requests.jsonl", "{}\n", "line 1 is not a request"),
        ("requests.jsonl", '{"version":1,"id":"a"}\n', "line 1 is not a request"),
        ("requests.jsonl", "<html>\n", "line 1 is not a request"),
    ],
)
def test_a_folder_that_does_not_read_is_refused_in_one_sentence(
    tmp_path: Path, name: str, content: str | None, said: str
) -> None:
    place = folder(tmp_path)
    place.close()
    (place.path / name).unlink(missing_ok=True)
    if content is not None:
        (place.path / name).write_text(content)
    with pytest.raises(UsageFault, match=said) as refused:
        load_run(str(place.path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        {"sent_s": "0"},
        {"end_s": None},
        {"text_s": [1, True]},
        {"output_tokens": -1},
        {"prompt_tokens": 1.5},
        {"phase": "x"},
        {"id": 3},
        {"failure": {}},
    ],
)
def test_a_line_with_a_value_of_the_wrong_kind_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    place = folder(tmp_path)
    place.record(bench_runs.four()[0], MEASURED)
    place.close()
    file = place.path / rundir.REQUESTS
    line = json.loads(file.read_text())
    file.write_text(json.dumps({**line, "unknown": 1}) + "\n")
    assert len(load_run(str(place.path)).outcomes) == 1
    file.write_text(json.dumps({**line, **change}) + "\n")
    with pytest.raises(UsageFault, match="line 1 is not a request"):
        load_run(str(place.path))


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    place = folder(tmp_path)
    for each in bench_runs.four():
        place.record(each, MEASURED)
    place.close()
    file = place.path / rundir.REQUESTS
    file.write_bytes(file.read_bytes()[:-10])
    assert [o.request.id for o in load_run(str(place.path)).outcomes] == ["a", "b", "c"]


@pytest.mark.parametrize(("cached", "noted"), [(99, True), (51, True), (50, False), (0, False), (None, False)])
def test_first_requests_that_were_in_a_cache_already_are_not_passed_off_as_cold(
    cached: int | None, noted: bool
) -> None:
    first = outcome("a", 1.0, [1.1], 1.2, is_first=True, cached_tokens=cached)
    later = outcome("b", 1.0, [1.1], 1.2, cached_tokens=99)
    for numbers in (
        summary.summarise(bench_runs.run([first, later]), None),
        summary.summarise(bench_runs.run([later], warmup=[first]), None),
    ):
        assert ("not_cold" in [note["code"] for note in numbers["notes"]]) == noted
