"""Prometheus text of one snapshot: every family is there from the first scrape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from lmcache.metrics import PREFIX, Counters, Gauges

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Snapshot(Collector):
    def __init__(self, counters: Mapping[str, float], gauges: Mapping[str, float]) -> None:
        self._counters = counters
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """All families with the values of this snapshot."""
        for item in fields(Counters):
            value = self._counters.get(item.name, 0)
            yield CounterMetricFamily(PREFIX + item.name, item.metadata["help"], value=value)
        for item in fields(Gauges):
            yield GaugeMetricFamily(PREFIX + item.name, item.metadata["help"], value=self._gauges.get(item.name, 0))


def render(counters: Mapping[str, float], gauges: Mapping[str, float]) -> bytes:
    """The text of ``/metrics``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(counters, gauges))
    return generate_latest(registry)
