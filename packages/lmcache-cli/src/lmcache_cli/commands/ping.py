"""`lmcache ping kvcache|engine`: is the server alive? Health probes call it often, so it does without httpx."""

from __future__ import annotations

import http.client
import time
from urllib.parse import urlsplit

import click

from lmcache_cli import api, failures, urls
from lmcache_cli._deadline import within
from lmcache_cli._version import __version__
from lmcache_cli.commands.base import ENGINE_URL, KVCACHE_URL, BaseCommand, failed, url_option
from lmcache_cli.errors import ServerError
from lmcache_cli.groups import Group
from lmcache_cli.render import Entry, Report, Section

DEADLINE_S = 10.0
BODY_BYTES_MAX = 64 << 10
WIDTH = 30


@click.group(cls=Group)
def ping() -> None:
    """Check that a server is alive. Exit status 0: it answers HTTP 200; 1: it does not."""


@ping.command("kvcache", cls=BaseCommand, title="Ping KV Cache")
@url_option(KVCACHE_URL, "LMCACHE_URL")
def ping_kvcache(url: str) -> Report:
    """Check that an LMCache server is alive."""
    return ping_report("Ping KV Cache", url + api.PATH_HEALTH)


@ping.command("engine", cls=BaseCommand, title="Ping Engine")
@url_option(ENGINE_URL, "LMCACHE_ENGINE_URL")
def ping_engine(url: str) -> Report:
    """Check that a serving engine (vLLM or alike) is alive."""
    return ping_report("Ping Engine", url + api.ENGINE_PATH_HEALTH)


def ping_report(title: str, url: str) -> Report:
    """Probe ``url`` once; a failure is part of the report, not an exception."""
    try:
        round_trip_s = within(DEADLINE_S, lambda: probe(url), str(failures.timed_out(url, DEADLINE_S)))
    except ServerError as error:
        return failed(report(title, "FAIL", None), error)
    return report(title, "OK", round(round_trip_s * 1e3, 2))


def probe(url: str) -> float:
    """Seconds from before the connection is made until a 200 has arrived.

    Raises:
        ServerError: no answer, or another one.
    """
    if urls.proxy_for(url):
        from lmcache_cli import client  # costs 100 ms to import; only where a proxy is needed

        start_s = time.perf_counter()
        client.probe(url)
        return time.perf_counter() - start_s
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=DEADLINE_S)
    start_s = time.perf_counter()
    try:
        connection.request("GET", parts.path, headers={"User-Agent": f"lmcache-cli/{__version__}"})
        response = connection.getresponse()
        round_trip_s = time.perf_counter() - start_s
        if response.status != 200:
            raise failures.http_failure(url, response.status, response.read(BODY_BYTES_MAX))
    except TimeoutError as error:
        raise failures.timed_out(url, DEADLINE_S) from error
    except (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, http.client.IncompleteRead) as error:
        raise failures.broken_off(url) from error
    except http.client.HTTPException as error:
        raise failures.not_http(url) from error
    except OSError as error:
        raise failures.unreachable(url, error) from error
    finally:
        connection.close()
    return round_trip_s


def report(title: str, status: str, round_trip_ms: float | None) -> Report:
    """The report on one probe."""
    entries = [
        Entry("status", "Status", status),
        Entry("round_trip_time_ms", "Round trip time (ms)", round_trip_ms),
    ]
    # the reference's sample aligns the two values with each other, not with the right edge
    return Report(title, WIDTH, [Section(entries)], flush_right=False)
