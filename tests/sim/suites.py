"""``python -m tests.sim.suites``: which planted bugs the suites of single parts find without the simulation."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
SUITES = (("tests/unit",), tuple(f"tests/tiers/test_{name}.py" for name in ("conformance", "catalog", "objects")))
CHOSEN = "not test_conformance or memory or file or null"  # tiers whose store needs no process


def is_found(mutation: Mutation | None) -> bool:
    """Whether a test fails, twice, with this bug planted, or with none: some fail now and then on a busy machine."""
    return any(_fails(suite, mutation) and _fails(suite, mutation) for suite in SUITES)


def _fails(suite: tuple[str, ...], mutation: Mutation | None) -> bool:
    options = ["-q", "-x", "-p", "tests.sim.planted", "-p", "no:cacheprovider", "-k", CHOSEN]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *suite],
        cwd=ROOT,
        env={**os.environ, **({"SIM_MUTATION": mutation.name} if mutation else {})},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    if ended.returncode not in (0, 1):
        raise RuntimeError(ended.stdout[-2000:] + ended.stderr[-2000:])
    return ended.returncode == 1


def main() -> int:
    """Print one line a bug, and how many of them were found."""
    if is_found(None):
        print("the suites fail without any bug planted", file=sys.stderr)
        return 1
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        found = []
        for mutation, known in zip(MUTATIONS, threads.map(is_found, MUTATIONS), strict=True):
            found.append(known)
            print(f"{'found ' if known else 'missed'}  {mutation.name}: {mutation.breaks}", flush=True)
    print(f"{sum(found)} of {len(MUTATIONS)} are found by the suites of single parts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
