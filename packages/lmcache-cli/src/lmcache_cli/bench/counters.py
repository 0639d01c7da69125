"""A cache server's own count of what was looked up and found, read before and after a run."""

from __future__ import annotations

from collections.abc import Mapping

from lmcache_cli import prometheus
from lmcache_cli.bench.summary import HIT, REQUESTED
from lmcache_cli.client import CacheServer
from lmcache_cli.errors import ServerError
from lmcache_cli.target import Target

PREFIX = "lmcache_mp_"
SUFFIX = "_total"


def read(target: Target) -> Mapping[str, float] | None:
    """Every counter of the server at ``target``, by name without prefix and suffix; None when it cannot be asked.

    A server that has not been asked yet shows no counters of lookups; these count as 0.
    """
    try:
        with CacheServer(target) as server:
            text = server.metrics()
    except ServerError:
        return None
    found = parse(text)
    return {HIT: 0.0, REQUESTED: 0.0, **found}


def parse(text: str) -> dict[str, float]:
    """The counters in Prometheus text, series of one name summed up."""
    counters: dict[str, float] = {}
    for name, _, value in prometheus.samples(text):
        if name.startswith(PREFIX) and name.endswith(SUFFIX):
            key = name[len(PREFIX) : -len(SUFFIX)]
            counters[key] = counters.get(key, 0.0) + value
    return counters
