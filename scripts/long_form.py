"""Parts of the session `long`, and what `coverage` measures: for noxfile.py."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import nox
from nox.command import CommandFailed

ROOT = Path(__file__).resolve().parents[1]
COVERED = ("wire", "cache", "keys", "layout")
COVERED_PERCENT = 95
FUZZ_S = 600

Parts = dict[str, Callable[[], object]]


def measure_coverage(session: nox.Session, python: Path) -> None:
    """Run the unit suite and some simulated seeds under coverage; fails where a part has less than it must."""
    with tempfile.TemporaryDirectory() as elsewhere:
        settings = {"PYTHONPATH": "", "COVERAGE_RCFILE": str(ROOT / "tests" / "coverage.ini")}
        settings["COVERAGE_FILE"] = f"{elsewhere}/data"

        def measure(*arguments: str) -> None:
            session.run(str(python), "-m", "coverage", *arguments, env=settings)

        with session.chdir(elsewhere):
            measure("run", "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests" / "unit"))
        with session.chdir(ROOT):
            measure("run", "-m", "tests.sim", "--seeds", "0-99")
        measure("combine", "-q")
        for part in COVERED:
            session.log(f"lmcache.{part}")
            included = f"*/lmcache/{part}/*,*/lmcache/{part}.py"
            measure("report", f"--include={included}", f"--fail-under={COVERED_PERCENT}")


def parts(session: nox.Session, python: Path) -> Parts:
    """The parts that the full package alone can run, by name; the session's first argument scales their amounts."""
    scale = _scale(session)

    def amount(whole: int) -> str:
        return str(max(1, round(whole * scale)))

    def program(*path: str) -> str:
        return str(ROOT.joinpath("tests", *path))

    def job(*command: str) -> Callable[[], object]:
        return lambda: _run(session, str(python), *command)

    seeds = f"0-{int(amount(10_000)) - 1}"
    return {
        "structural": job(program("hostile", "structural.py"), "--faults", amount(10_000)),
        "kills": job(program("hostile", "harness.py"), "--kills", amount(2_000)),
        "session": job(program("hostile", "session_budget.py"), "--faults", amount(1_000)),
        "tier": job(program("server", "tier_crashes.py"), "--kills", amount(500)),
        "sim": job("-m", "tests.sim", "--seeds", seeds, "--jobs", str(os.cpu_count() or 1)),
    }


def fuzz(session: nox.Session, python: Path) -> None:
    """The decoders, for as long as the scale says."""
    _run(session, str(python), str(ROOT / "fuzz" / "run.py"), "--seconds", str(max(1, round(FUZZ_S * _scale(session)))))


def run(session: nox.Session, known: Parts) -> None:
    """The parts that the session's arguments name, or all; a part that fails does not keep the others from running."""
    chosen = session.posargs[1:]
    unknown = set(chosen) - set(known)
    if unknown:
        session.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    failed = []
    for name in chosen or [name for name in known if name != "planted" or _scale(session) >= 1]:
        session.log(f"long: {name}")
        try:
            known[name]()
        except CommandFailed:
            failed.append(name)
    if failed:
        session.error(f"failed: {', '.join(failed)}")


def _scale(session: nox.Session) -> float:
    return float(session.posargs[0]) if session.posargs else 1.0


def _run(session: nox.Session, *command: str) -> None:
    with session.chdir(ROOT):
        session.run(*command, env={"PYTHONPATH": ""})
