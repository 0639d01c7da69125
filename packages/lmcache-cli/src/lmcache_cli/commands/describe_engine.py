"""`lmcache describe engine`: which model a serving engine serves, and how busy it is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click

from lmcache_cli import prometheus
from lmcache_cli.commands.base import ENGINE, BaseCommand, failed, server_options
from lmcache_cli.errors import ServerError, Unhealthy
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

if TYPE_CHECKING:
    from lmcache_cli.client import Engine

TITLE = "Inference Engine"
WIDTH = 50
KEYS = ("url", "model", "max_context", "running_requests", "models")

RUNNING = ("vllm:num_requests_running", "lmcache_engine_requests_running")
"""Gauges that count the requests an engine works on; their samples (one an engine process) are added."""


@click.command("engine", cls=BaseCommand, title=TITLE, keys=KEYS, watch=True)
@server_options(ENGINE)
def describe_engine(target: Target) -> Report:
    """Show the model, the context length, the health and the running requests of a serving engine.

    Exit status 1: it cannot be reached, or says that it is not healthy.
    """
    from lmcache_cli.client import Engine

    with Engine(target) as engine, ThreadPoolExecutor(3) as pool:
        served, health, running = (
            pool.submit(engine.served),
            pool.submit(engine.is_healthy),
            pool.submit(_running, engine),
        )
        models, is_healthy, num_running = served.result(), health.result(), running.result()
    first = models[0] if models else None
    entries = [
        Entry("url", None, target.url),
        Entry("model", "Model", first.name if first else None),
        Entry("max_context", "Max context (tokens)", first.max_model_len if first else None),
        Entry("status", "Status", "OK" if is_healthy else "UNHEALTHY"),
        Entry("running_requests", "Running requests", num_running),
        Entry("models", None, [model.name for model in models]),
    ]
    report = Report(TITLE, WIDTH, [Section(entries)])
    return report if is_healthy else failed(report, Unhealthy(f"{target.url} says that it is not healthy"))


def _running(engine: Engine) -> int | None:
    try:
        samples = prometheus.samples(engine.metrics())
    except ServerError:
        return None
    values = [value for name, _, value in samples if name in RUNNING]
    return int(sum(values)) if values else None
