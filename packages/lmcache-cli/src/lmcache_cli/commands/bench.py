"""`lmcache bench`: measuring."""

from __future__ import annotations

import click

from lmcache_cli.commands.bench_compare import bench_compare
from lmcache_cli.commands.bench_engine import bench_engine
from lmcache_cli.commands.bench_sweep import bench_sweep
from lmcache_cli.groups import OpenGroup


@click.group(cls=OpenGroup)
def bench() -> None:
    """Measure a serving engine or a server under load."""


bench.add_command(bench_engine)
bench.add_command(bench_compare)
bench.add_command(bench_sweep)
