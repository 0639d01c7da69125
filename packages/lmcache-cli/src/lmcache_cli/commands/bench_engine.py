"""`lmcache bench engine`: one workload against a serving engine, from the plan to the report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from lmcache_cli import progress
from lmcache_cli.bench import config, config_file, guide, summary
from lmcache_cli.commands.bench_options import (
    Asked,
    BenchCommand,
    answered,
    complain,
    read,
    settings_options,
    with_folder,
)
from lmcache_cli.errors import UsageFault
from lmcache_cli.render import Entry, Failure, Report, Section

if TYPE_CHECKING:
    from lmcache_cli.bench import run

TITLE = "Engine Benchmark Result"
WIDTH = 56


@click.command(
    "engine", cls=BenchCommand, title=TITLE, keys=(*summary.KEYS, "run_folder"), list_names=summary.LIST_NAMES
)
@settings_options
@click.option("--export-config", "export_path", metavar="FILE", help="Write the settings to a file and run nothing.")
@click.option("--dry-run", is_flag=True, help="Stop after the plan.")
def bench_engine(export_path: str | None, dry_run: bool, **parameters: Any) -> Report:
    """Measure a serving engine (vLLM or alike) under one workload.

    Without --workload it asks, step by step. Every run makes a folder of its own below --output-dir. Exit status 1:
    requests failed; 130: interrupted, with a report on what was done so far.
    """
    if export_path is not None and dry_run:
        raise UsageFault("--export-config and --dry-run exclude each other")
    asked = read(click.get_current_context(), parameters)
    answers = answered(asked, may_ask=export_path is None)
    if answers.action is guide.Action.QUIT:
        click.get_current_context().exit(0)
    settings = config.build(answers.values)
    if export_path is not None or answers.action is guide.Action.EXPORT:
        return export(asked, settings, export_path or answers.export_path or guide.EXPORT_NAME)
    job = prepare(asked, settings, is_dry=dry_run)
    if dry_run:
        return plan_report(job)
    with progress.make(asked.quiet) as display:
        return measure(asked, job, display)[0]


def export(asked: Asked, settings: config.Config, path: str) -> Report:
    """Write the settings, with what could be asked for filled in."""
    from lmcache_cli.bench import run

    file = config_file.Export(path)
    settled = run.settle(settings, asked.engine(settings), asked.server(settings))
    file.write(settled)
    command = f"lmcache bench engine --engine-url {settings.engine_url} --config {shlex.quote(path)}"
    entries = [
        Entry("workload", "Workload", settled.workload),
        Entry("model", "Model", settled.model),
        Entry("tokens_per_gb_kvcache", "Tokens per GB", settled.tokens_per_gb_kvcache),
        Entry("config_file", "Configuration exported to", path),
        Entry("replay", "Replay with", command),
        Entry("config", None, settled.as_file()),
    ]
    return Report("Engine Benchmark Configuration", WIDTH, [Section(entries)])


def prepare(asked: Asked, settings: config.Config, *, is_dry: bool) -> run.Job:
    """The run that these settings describe; asks the engine and the server for what is missing."""
    from lmcache_cli.bench import run, stream

    engine, server = asked.engine(settings), asked.server(settings)
    stream.check(engine)
    knows_enough = settings.tokens_per_gb_kvcache is not None or not config.needs_tokens_per_gb(settings.workload)
    if not (is_dry and knows_enough):
        settings = run.settle(settings, engine, server)
    return run.planned(settings, engine, server)


def measure(asked: Asked, job: run.Job, display: progress.Silent) -> tuple[Report, Mapping[str, Any], str]:
    """Carry out a run and write its folder; returns report, summary and the folder's path.

    Raises:
        UsageFault: the folder cannot be written; nothing was sent.
        CommandError: the run could not begin, or its warm-up failed; what was measured is in the folder.
    """
    from lmcache_cli.bench import page, report, run, rundir

    folder = rundir.RunFolder(asked.output_dir, job.config.workload, job.config.as_file())
    try:
        for line in plan_lines(job):
            display.say(line)
        display.say(f"results: {folder.path}")
        result = run.execute(job, display, folder.record)
    finally:
        display.end()
        folder.close()
    with run.deaf():
        numbers = summary.summarise(result, job.config.goodput_ms)
        problem = folder.finish(
            result.warmup, result.outcomes, numbers, lambda: page.run_page(numbers, result.warmup, result.outcomes)
        )
    shown = with_folder(report.report(numbers), folder.path)
    if problem is not None:
        if shown.failure is None:
            shown = _failed(shown, problem.code, str(problem))
        else:
            complain(problem)
    return shown, numbers, str(folder.path)


def plan_entries(job: run.Job) -> list[Entry]:
    """The plan, a row a fact."""
    plan, pacing = job.plan, job.pacing
    tokens_per_gb = job.config.tokens_per_gb_kvcache
    gb = None if tokens_per_gb is None else plan.distinct_tokens / tokens_per_gb
    estimate = job.estimate
    pace = f"{pacing.concurrency} in flight" if pacing.concurrency else f"{pacing.rate_per_s:g}/s, {pacing.arrival}"
    return [
        *(
            Entry(f"documents.{label.replace(' ', '_')}", label.capitalize(), number)
            for label, number in plan.documents
        ),
        Entry("num_requests", "Requests", plan.num_requests),
        Entry("num_warmup_requests", "Warm-up requests", 0 if job.config.no_warmup else plan.num_warmup_requests),
        Entry("prompt_tokens", "Prompt tokens", plan.prompt_tokens),
        Entry("distinct_tokens", "Distinct tokens", plan.distinct_tokens),
        Entry("distinct_gb", "Distinct KV cache (GB)", gb),
        Entry("output_tokens_max", "Output tokens at most", plan.output_tokens_max),
        Entry("pace", "Pace", pace),
        Entry("estimated_s", "Estimated time (s)", estimate.duration_s),
        Entry("estimated_from", "Estimated from", estimate.reason),
    ]


def plan_lines(job: run.Job) -> list[str]:
    """The plan for people."""
    lines = [f"plan: {job.config.workload}, model {job.config.model or 'the first one'}"]
    for entry in plan_entries(job):
        lines.append(f"  {f'{entry.label}:':<26} {_shown(entry.value)}")
    return lines


def _shown(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "N/A"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def plan_report(job: run.Job) -> Report:
    """The plan as the result of `--dry-run`."""
    settings = job.config
    general = [
        Entry("engine_url", "Engine", settings.engine_url),
        Entry("model", "Model", settings.model),
        Entry("workload", "Workload", settings.workload),
        Entry("config", None, settings.as_file()),
    ]
    plan = [Entry(f"plan.{entry.key}", entry.label, entry.value) for entry in plan_entries(job)]
    sections = [Section(general, "Configuration"), Section(plan, "Plan")]
    return Report(f"Engine Benchmark Plan ({settings.workload})", WIDTH, sections)


def _failed(report: Report, code: str, message: str) -> Report:
    from dataclasses import replace

    return replace(report, failure=Failure(code, message))
