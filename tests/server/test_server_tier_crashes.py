"""The short form of ``tier_crashes.py``."""

from __future__ import annotations

from tier_crashes import run


def test_after_any_kill_hits_are_byte_exact_and_nothing_that_the_tier_acknowledged_is_lost() -> None:
    harness = run(kills=12, seed=20261124)
    assert harness.num_verified > 100
