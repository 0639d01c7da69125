"""Seeds in numbers, and that each of them replays exactly. ``SIM_SEEDS=A-B`` makes it a longer run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SEEDS = os.environ.get("SIM_SEEDS", "0-1499")


def simulate(
    *arguments: str, hash_seed: str = "random", hang_guard_s: float = 3600
) -> subprocess.CompletedProcess[str]:
    """Run worlds in a process of their own."""
    return subprocess.run(
        [sys.executable, "-m", "tests.sim", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=hang_guard_s,
        check=False,
    )


def test_no_seed_breaks_an_invariant() -> None:
    ended = simulate("--seeds", SEEDS, "--jobs", str(os.cpu_count() or 1))
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-4000:]
    print(ended.stdout.splitlines()[-1])


def test_a_seed_replays_exactly_whatever_the_hash_seed() -> None:
    for seed in range(20, 26):
        runs = [simulate("--seed", str(seed), hash_seed=hash_seed) for hash_seed in ("1", "2")]
        assert [run.returncode for run in runs] == [0, 0], runs[0].stdout + runs[0].stderr
        digests = {run.stdout.split()[0] for run in runs}
        assert len(digests) == 1, f"seed {seed} took two courses"


def test_much_happens_in_the_worlds() -> None:
    """An invariant that nobody comes near to says nothing."""
    from .world import run_seed

    happened: dict[str, float] = {}
    for seed in range(40):
        result = run_seed(seed)
        assert result.problem is None, result.problem
        for name, value in result.counts.items():
            happened[name] = happened.get(name, 0) + value
    names = ("accepted", "stored", "promoted", "kept", "kill engine", "kill core", "kill service", "stop core")
    for name in (*names, "parts of frames by the client", "parts of frames by the core"):
        assert happened[name] > 0, f"{name} never happened"
