"""`lmcache describe engine`: which model a serving engine serves, and how busy it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

import click

from lmcache_cli import prometheus
from lmcache_cli.commands.base import ENGINE, BaseCommand, failed, server_options
from lmcache_cli.errors import HttpFailure, ServerError, Unhealthy
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

if TYPE_CHECKING:
    from lmcache_cli.client import Engine

T = TypeVar("T")

TITLE = "Inference Engine"
WIDTH = 50
KEYS = ("url", "model", "max_context", "running_requests", "models")

RUNNING = ("vllm:num_requests_running", "lmcache_engine_requests_running")
"""Gauges that count the requests an engine works on; their samples (one an engine process) are added."""


@click.command("engine", cls=BaseCommand, title=TITLE, keys=KEYS, watch=True)
@server_options(ENGINE)
def describe_engine(target: Target) -> Report:
    """Show the model, the context length, the health and the running requests of a serving engine.

    Exit status 1: it cannot be reached, says that it is not healthy, or refuses to say. One without a health check is
    shown with N/A.
    """
    from lmcache_cli.client import Engine

    with Engine(target) as engine:  # each call is bounded by the deadline, and all run side by side
        served, health, running = _start(engine.served), _start(engine.health), _start(lambda: _running(engine))
        models, num_running = served.result(), running.result()
        error = health.exception()
    first = models[0] if models else None
    entries = [
        Entry("url", None, target.url),
        Entry("model", "Model", first.name if first else None),
        Entry("max_context", "Max context (tokens)", first.max_model_len if first else None),
        Entry("status", "Status", _health(error)),
        Entry("running_requests", "Running requests", num_running),
        Entry("models", None, [model.name for model in models]),
    ]
    report = Report(TITLE, WIDTH, [Section(entries)])
    if isinstance(error, HttpFailure) and error.status >= 500:
        return failed(report, Unhealthy(f"{target.url} says that it is not healthy: {error}"))
    if isinstance(error, ServerError) and not _has_no_check(error):
        return failed(report, error)
    return report


def _health(error: BaseException | None) -> str | None:
    if error is None:
        return "OK"
    if not isinstance(error, ServerError):
        raise error
    return "UNHEALTHY" if isinstance(error, HttpFailure) and error.status >= 500 else None


def _has_no_check(error: ServerError) -> bool:
    return isinstance(error, HttpFailure) and error.status in (404, 405)


def _start(call: Callable[[], T]) -> Future[T]:
    """Run ``call`` beside us. No executor: the interpreter would wait for its threads after ctrl-C."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _running(engine: Engine) -> int | None:
    try:
        samples = prometheus.samples(engine.metrics())
    except ServerError:
        return None
    values = [value for name, _, value in samples if name in RUNNING]
    return int(sum(values)) if values else None
