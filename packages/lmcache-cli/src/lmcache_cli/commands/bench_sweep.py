"""`lmcache bench sweep`: the same workload under one load after another, in one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from lmcache_cli import progress
from lmcache_cli.bench import config, run, rundir, sweep
from lmcache_cli.commands.bench_engine import measure, prepare
from lmcache_cli.commands.bench_options import (
    Asked,
    BenchCommand,
    answered,
    complain,
    read,
    settings_options,
    with_folder,
)
from lmcache_cli.errors import CommandError, UsageFault
from lmcache_cli.render import Failure, Report

TITLE = "Engine Benchmark Sweep"


@click.command("sweep", cls=BenchCommand, title=TITLE, keys=(*sweep.KEYS, "run_folder"), list_names=sweep.LIST_NAMES)
@click.option("--rates", metavar="LIST", help="Requests per second, one run each, as in 1,2,4.")
@click.option("--concurrencies", metavar="LIST", help="Requests in flight, one run each, as in 1,4,16.")
@settings_options
def bench_sweep(rates: str | None, concurrencies: str | None, **parameters: Any) -> Report:
    """Measure a serving engine under growing load: one run of the workload for each of --rates or --concurrencies.

    Every run has texts of its own (--seed, then the numbers after it), so that no run
    finds the cache of the one before.
    """
    asked = read(click.get_current_context(), parameters)
    if (rates is None) == (concurrencies is None):
        raise UsageFault("name either --rates or --concurrencies")
    for option in (config.CONCURRENCY, config.REQUEST_RATE):
        if option.key in asked.given:
            raise UsageFault(f"{option.flag} has no meaning in a sweep, which names its own points")
    kind = sweep.RATE if rates is not None else sweep.CONCURRENCY
    flag, text = ("--rates", rates) if rates is not None else ("--concurrencies", concurrencies)
    points = sweep.parse_points(flag, text or "", kind)
    key = (config.REQUEST_RATE if rates is not None else config.CONCURRENCY).key
    values = [point if key == config.REQUEST_RATE.key else int(point) for point in points]
    first = replace(asked, given={**asked.given, key: values[0]})
    job = prepare(first, config.build(answered(first, may_ask=False).values), is_dry=False)
    changes: list[dict[str, Any]] = [{key: value, "seed": job.config.seed + i} for i, value in enumerate(values)]
    jobs = [run.planned(replace(job.config, **change), job.engine, job.server) for change in changes]
    folder = _folder(asked.output_dir, job.config.workload)
    done = _run_all(replace(asked, output_dir=str(folder)), jobs, points)
    with run.deaf():
        numbers = sweep.sweep_summary(kind, done)
        report = with_folder(sweep.report(numbers), folder)
        problem = _write(folder, numbers)
    if problem is None:
        return report
    if report.failure is not None:
        complain(problem)
        return report
    return replace(report, failure=Failure("bench", problem))


def _run_all(
    asked: Asked, jobs: Sequence[run.Job], points: Sequence[float]
) -> list[tuple[float, str, Mapping[str, Any]]]:
    """Value, folder and summary of each run that was begun; a run that could not be carried out ends the sweep."""
    done: list[tuple[float, str, Mapping[str, Any]]] = []
    with progress.make(asked.quiet) as display:
        for number, (job, point) in enumerate(zip(jobs, points), 1):  # noqa: B905
            display.say(f"run {number} of {len(jobs)}: {point:g}")
            try:
                _, numbers, path = measure(asked, job, display)
            except CommandError as error:
                if not done:
                    raise
                complain(error)
                break
            done.append((point, path, numbers))
            if numbers["is_interrupted"]:
                break
    return done


def _folder(output_dir: str, workload: str) -> Path:
    """A fresh folder for all runs.

    Raises:
        UsageFault: it cannot be made.
    """
    name = f"lmcache-bench-sweep-{workload}-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    try:
        for path in (Path(output_dir) / f"{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 100)))):
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return path
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageFault(f"cannot write --output-dir {output_dir}: {reason}") from error
    raise UsageFault(f"cannot write --output-dir {output_dir}: too many sweeps have begun in this second")


def _write(folder: Path, numbers: Mapping[str, Any]) -> str | None:
    """The documents of the sweep; what could not be written, if anything."""
    try:
        rundir.write_document(folder / sweep.DOCUMENT, numbers)
        (folder / sweep.PAGE).write_text(sweep.sweep_page(numbers), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        return f"cannot write the sweep's report in {folder}: {error.strerror or error}"
    return None
