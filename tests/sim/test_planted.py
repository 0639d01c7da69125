"""Each planted bug is found within some hundred seeds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
SEEDS = "0-999"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name.replace(" ", "-"))
def test_a_planted_bug_is_found(mutation: Mutation) -> None:
    options = ["--seeds", SEEDS, "--first", "--trace", "0", "--jobs", str(os.cpu_count() or 1)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--mutation", mutation.name, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert ended.returncode == 1, f"{ended.stdout[-300:]}{ended.stderr[-2000:]}"
    assert ended.stdout.startswith("seed "), ended.stdout


def test_there_are_twenty_of_them() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) >= 20
