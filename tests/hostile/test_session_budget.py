"""The short form of ``session_budget.py``."""

from __future__ import annotations

from session_budget import run

HANG_MS = 10_000


def test_a_server_that_is_killed_and_stopped_holds_no_call_of_the_asking_side() -> None:
    counts, seen, _ = run(faults=16, seed=20261124)
    assert counts["killed"] > 0
    assert counts["stopped"] > 0
    for lane in seen:
        assert lane["answers"] > 0
        assert lane["misses"] > 0  # it does notice
        assert lane["calls_ms"]["max"] < HANG_MS
        assert lane["questions_ms"]["max"] < HANG_MS
