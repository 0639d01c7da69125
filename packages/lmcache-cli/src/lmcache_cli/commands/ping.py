"""`lmcache ping kvcache|engine`: is the server alive? Health probes call it often, so it does without httpx."""

from __future__ import annotations

import http.client
import time
from dataclasses import replace
from urllib.parse import urlsplit

import click

from lmcache_cli import api, failures, legacy, urls
from lmcache_cli._deadline import within
from lmcache_cli.commands.base import ENGINE, KVCACHE, BaseCommand, failed, seconds, server_options
from lmcache_cli.errors import HttpFailure, ServerError
from lmcache_cli.groups import Group
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

BODY_BYTES_MAX = 64 << 10
RETRY_S = 0.2
WIDTH = 30

KEYS = ("round_trip_time_ms",)


@click.group(cls=Group)
def ping() -> None:
    """Check that a server is alive."""


_wait = click.option(
    "--wait", metavar="SECONDS", type=float, callback=seconds, help="Try again until it is alive, at most that long."
)


@ping.command("kvcache", cls=BaseCommand, title="Ping KV Cache", keys=KEYS, watch=True)
@server_options(KVCACHE)
@_wait
def ping_kvcache(target: Target, wait: float | None) -> Report:
    """Check that an LMCache server is alive.

    Exit status 0: it answers HTTP 200; 1: it does not.
    """
    return ping_report("Ping KV Cache", target, (api.PATH_HEALTH, legacy.PATH_HEALTH), wait)


@ping.command("engine", cls=BaseCommand, title="Ping Engine", keys=KEYS, watch=True)
@server_options(ENGINE)
@_wait
def ping_engine(target: Target, wait: float | None) -> Report:
    """Check that a serving engine (vLLM or alike) is alive.

    Exit status 0: it answers HTTP 200; 1: it does not.
    """
    return ping_report("Ping Engine", target, (api.ENGINE_PATH_HEALTH,), wait)


def ping_report(title: str, target: Target, paths: tuple[str, ...], wait_s: float | None) -> Report:
    """Probe until it answers 200 or ``wait_s`` are over, once without it; a failure is part of the report.

    Args:
        paths: the second and later ones are those of earlier generations, asked after a 404.
    """
    end_s = time.monotonic() + (wait_s or 0.0)
    while True:
        try:
            round_trip_s = _first_answer(target, paths, None if wait_s is None else end_s)
        except ServerError as error:
            if time.monotonic() + RETRY_S >= end_s:
                return _gave_up(failed(report(title, "FAIL", None), error), wait_s)
        else:
            return report(title, "OK", round(round_trip_s * 1e3, 2))
        time.sleep(RETRY_S)


def _gave_up(report: Report, wait_s: float | None) -> Report:
    """``report``, whose failure says how long it was waited."""
    if wait_s is None or report.failure is None:
        return report
    message = f"{report.failure.message} (still so after waiting {wait_s:g} s)"
    return replace(report, failure=replace(report.failure, message=message))


def _first_answer(target: Target, paths: tuple[str, ...], end_s: float | None) -> float:
    deadline_s = target.timeout_s if end_s is None else min(target.timeout_s, max(end_s - time.monotonic(), RETRY_S))
    target = replace(target, timeout_s=deadline_s)
    for path in paths[:-1]:
        try:
            return _bounded_probe(target, path)
        except HttpFailure as failure:
            if failure.status != 404:
                raise
            first = failure
    try:
        return _bounded_probe(target, paths[-1])
    except HttpFailure as failure:
        raise (first if len(paths) > 1 else failure) from failure


def _bounded_probe(target: Target, path: str) -> float:
    overdue = str(failures.timed_out(target.url + path, target.timeout_s))
    return within(target.timeout_s, lambda: probe(target, path), overdue)


def probe(target: Target, path: str) -> float:
    """Seconds from before the connection is made until a 200 has arrived.

    Raises:
        ServerError: no answer, or another one.
    """
    if urls.proxy_for(target.url):
        from lmcache_cli import client  # costs 100 ms to import; only where a proxy is needed

        start_s = time.perf_counter()
        client.probe(target, path)
        return time.perf_counter() - start_s
    url = target.url + path
    connection = _connection(target)
    start_s = time.perf_counter()
    try:
        connection.request("GET", urlsplit(url).path, headers=target.all_headers())
        response = connection.getresponse()
        round_trip_s = time.perf_counter() - start_s
        if response.status != 200:
            raise failures.http_failure(url, response.status, response.read(BODY_BYTES_MAX))
    except TimeoutError as error:
        raise failures.timed_out(url, target.timeout_s) from error
    except (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, http.client.IncompleteRead) as error:
        raise failures.broken_off(url) from error
    except http.client.HTTPException as error:
        raise failures.not_http(url) from error
    except OSError as error:
        raise failures.unreachable(url, error) from error
    finally:
        connection.close()
    return round_trip_s


def _connection(target: Target) -> http.client.HTTPConnection:
    parts = urlsplit(target.url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        return http.client.HTTPSConnection(host, parts.port, timeout=target.timeout_s, context=target.ssl_context())
    return http.client.HTTPConnection(host, parts.port, timeout=target.timeout_s)


def report(title: str, status: str, round_trip_ms: float | None) -> Report:
    """The report on one probe."""
    entries = [
        Entry("status", "Status", status),
        Entry("round_trip_time_ms", "Round trip time (ms)", round_trip_ms),
    ]
    # the reference's sample aligns the two values with each other, not with the right edge
    return Report(title, WIDTH, [Section(entries)], flush_right=False)
