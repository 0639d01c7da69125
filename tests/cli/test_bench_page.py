"""The page of a run, as text; tests/browser opens it."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import bench_runs
import pytest
from bench_runs import outcome

from lmcache_cli.bench import page, plots, summary, sweep
from lmcache_cli.bench.base import Pacing

EVIL = "</script><img src=x onerror=alert(1)>"


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.found and self.found[-1][0] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def made(**changes: Any) -> str:
    outcomes = [
        *bench_runs.four(),
        outcome(EVIL, 1003.0, [], 1004.0, failure=(EVIL, EVIL)),
        outcome(EVIL + "2", 1003.0, [1003.5], 1004.0),
    ]
    run = bench_runs.run(outcomes, {**bench_runs.CONFIG, "engine_url": EVIL, **changes})
    run.model = EVIL
    return page.run_page(summary.summarise(run, {"ttft": 500.0}), run.warmup, run.outcomes)


def test_what_was_received_is_text_and_never_an_element() -> None:
    elements = Elements(made())
    assert "img" not in [tag for tag, _ in elements.found]
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert EVIL in elements.text


def test_the_page_fetches_nothing() -> None:
    elements = Elements(made())
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "img", "object", "base")
        assert not {"src", "href", "srcset", "action"} & set(attributes)
    (policy,) = [a["content"] for t, a in elements.found if t == "meta" and a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy


def test_the_page_has_the_figures_of_the_summary() -> None:
    text = Elements(made()).text
    for words in ("P99 985.00", "Time to First Token (ms) Mean", "Failed requests 2", "Limits ttft <= 500 ms"):
        assert words in text, text


WITHOUT_PLOTLY = """
import sys
sys.modules["plotly"] = None
sys.path.insert(0, sys.argv[1])
import bench_runs
from lmcache_cli.bench import page, summary
run = bench_runs.run(bench_runs.four())
sys.stdout.write(page.run_page(summary.summarise(run, None), [], run.outcomes))
"""


def test_without_plotly_the_page_has_its_tables_and_says_how_to_get_plots() -> None:
    command = [sys.executable, "-c", WITHOUT_PLOTLY, str(Path(__file__).parent)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    elements = Elements(text)
    assert "script" not in [tag for tag, _ in elements.found]
    assert "This page has no plots" in elements.text
    assert "P99 984.00" in elements.text


def test_figures_stay_small_however_large_the_run() -> None:
    outcomes = [outcome(f"r{i}", i * 0.1, [i * 0.1 + 0.05], i * 0.1 + 0.2, is_first=i % 9 == 0) for i in range(5000)]
    figures = plots.run_figures([], outcomes)
    assert len(figures) == 4
    assert len(page._json(figures)) < 1_000_000
    assert "3000 of 5000 requests" in figures[-1]["title"]


def test_a_thinned_curve_ends_at_all_requests_and_at_the_slowest() -> None:
    outcomes = [outcome(f"r{i}", 0.0, [0.001 * (i + 1)], 6.0) for i in range(5000)]
    (curve,) = plots.run_figures([], outcomes)[0]["data"]
    assert (curve["x"][0], curve["x"][-1], curve["y"][-1]) == (1.0, 5000.0, 100.0)
    for x, y in zip(curve["x"][1:], curve["y"][1:], strict=True):
        assert y == pytest.approx(x / 50, abs=1e-3)  # so many of the 5,000 took at most x ms


def test_a_run_in_which_everything_failed_has_a_page() -> None:
    run = bench_runs.run([bench_runs.four()[3]])
    text = Elements(page.run_page(summary.summarise(run, None), [], run.outcomes)).text
    assert "1 of 1 requests failed" in text


def test_a_run_without_any_request_has_a_page() -> None:
    text = Elements(page.run_page(summary.summarise(bench_runs.run([]), None), [], [])).text
    assert "so nothing was measured" in text
    assert "Mean N/A" in text


def test_a_sweep_has_a_page_with_its_table() -> None:
    run = bench_runs.run(bench_runs.four(), pacing=Pacing(rate_per_s=1.0))
    numbers = sweep.sweep_summary(sweep.RATE, [(1.0, EVIL, summary.summarise(run, None))])
    elements = Elements(sweep.sweep_page(numbers))
    assert re.search(r"Rate \(req/s\) Sent/s Done/s .* 1 1\.00 0\.75", elements.text)
    assert "img" not in [tag for tag, _ in elements.found]
