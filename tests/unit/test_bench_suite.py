"""The suite of benchmarks: what belongs to one run stands in one table, and nothing else does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SPREAD = {"median": 2.0, "q1": 1.5, "q3": 2.5, "min": 1.0, "max": 3.0, "n": 3.0}
MARKS = "before\n<!-- suite: begin -->\nold\n<!-- suite: end -->\nafter\n"


def document(**changes: Any) -> dict[str, Any]:
    row = {
        "name": "a row",
        "unit": "us",
        "figures": {"ours": SPREAD, "bare": SPREAD},
        "value": 1.0,
        "says": "ours / bare",
    }
    row |= {"bound": 1.5, "at_least": False, "note": ""}
    facts = {
        "run": "r1",
        "machine": "m",
        "load": 0.1,
        "commit": "c",
        "command": "python benchmarks/x.py --json /a/b --model /c --rounds 2",
    }
    return {**facts, "rows": [row], "details": None, **changes}


def render(out: Path, page: Path, **documents: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    for name, content in documents.items():
        (out / f"{name}.json").write_text(json.dumps(content))
    command = [sys.executable, str(BENCHMARKS / "suite.py"), str(out), "--render", "--page", str(page)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_figures_of_one_run_are_one_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARKS)
    missed = document()
    missed["rows"][0] |= {"name": "another row", "value": 1.6}
    done = render(tmp_path, page, round_trip=document(), lookup=missed)
    assert done.returncode == 1, done.stderr
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "1 of 2 bounds reached" in text
    assert "`python benchmarks/x.py --model PATH --rounds 2`, load 0.1:" in text
    assert "- Lookup: another row" in text
    assert "| a row | 2.00 us (1.50-2.50) | 2.00 us (1.50-2.50) | ours / bare: 1.00 | <= 1.50 | reached |" in text


@pytest.mark.parametrize("what", ["run", "machine", "commit"])
def test_figures_of_different_runs_are_refused(tmp_path: Path, what: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(MARKS)
    done = render(tmp_path, page, round_trip=document(), lookup=document(**{what: "another"}))
    assert done.returncode == 2
    assert "figures of different runs" in done.stderr
    assert what in done.stderr
    assert page.read_text() == MARKS


def test_a_page_without_marks_stays_as_it_is(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("mine\n")
    assert render(tmp_path, page, lookup=document()).returncode == 2
    assert page.read_text() == "mine\n"
