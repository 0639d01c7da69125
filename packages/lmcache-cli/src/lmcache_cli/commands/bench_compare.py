"""`lmcache bench compare`: two run folders, request by request."""

from __future__ import annotations

import math

import click

from lmcache_cli.bench.compare import KEYS, LIST_NAMES
from lmcache_cli.commands.base import BaseCommand
from lmcache_cli.render import Report

TITLE = "Engine Benchmark Comparison (B against A)"
_PERCENT_MAX = 1000.0


def _percent(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if math.isfinite(value) and 0 <= value <= _PERCENT_MAX:
        return value
    raise click.BadParameter(f"expected a percentage from 0 to {_PERCENT_MAX:g}", ctx, param)


@click.command("compare", cls=BaseCommand, title=TITLE, keys=KEYS, list_names=LIST_NAMES)
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option(
    "--threshold",
    metavar="PERCENT",
    type=float,
    default=5.0,
    show_default=True,
    callback=_percent,
    help="How much worse B may be.",
)
def bench_compare(a: str, b: str, threshold: float) -> Report:
    """Compare two runs of the same requests, whose folders `bench engine` made.

    Requests are paired by their id. B fails (exit 1) where the 95 % interval of a metric's mean difference lies wholly
    beyond the threshold, in percent of A's mean, or where so many more requests failed.
    """
    from lmcache_cli.bench import compare
    from lmcache_cli.bench.rundir import load_run

    return compare.report(compare.compare(load_run(a), load_run(b), threshold))
