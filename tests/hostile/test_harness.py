"""The short form of ``harness.py``."""

from __future__ import annotations

from harness import run

HANG_MS = 10_000


def test_whatever_is_killed_stopped_or_cut_off_no_byte_is_wrong_nothing_stays_held_and_no_call_hangs() -> None:
    done = run(20261124, seconds=45)
    assert sum(done.faults.values()) >= 16
    assert done.seen["engine accepted"] > 500
    assert done.seen["session answers"] > 20
    assert done.seen["session calls_ms max"] < HANG_MS
    assert done.seen["session questions_ms max"] < HANG_MS
    print(done.faults, done.seen, done.quiet_s)
