"""The short form of ``structural.py``."""

from __future__ import annotations

import pytest
from structural import run

FAULTS = 400


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")  # a line for each chunk that fails its check


def test_whatever_is_damaged_late_or_taken_away_between_a_store_and_its_use_no_wrong_byte_is_used() -> None:
    made = run(FAULTS, seed=20261124)
    assert made.wrong == []
    assert made.num_used > FAULTS  # chunks, most of them right in spite of everything
    assert sum(made.counts.values()) == FAULTS
    assert made.counts["none", "harmless"] > 0
    assert made.counts["none", "caught"] == 0
    for damage in ("pool: swapped", "pool: zeroed", "pool: bit flipped", "answer: checksum changed"):
        assert made.counts[damage, "caught"] > 0
        assert made.counts[damage, "harmless"] == 0, f"{damage} was not seen"
