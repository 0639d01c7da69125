"""Prometheus text of one snapshot: every family is there from the first scrape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from lmcache.metrics import PREFIX, Counters, Gauges

if TYPE_CHECKING:
    from lmcache.cascade.run import TierState

_TIER_GAUGES = {
    "up": "1 while the tier is in use, 0 while it is left alone after failures",
    "num_objects": "Objects, where the tier can tell",
    "used_bytes": "Bytes of objects, where the tier can tell",
    "capacity_bytes": "Bytes that objects may take, where there is a limit",
}

CONTENT_TYPE = CONTENT_TYPE_LATEST


class _Snapshot(Collector):
    def __init__(self, counters: Mapping[str, float], gauges: Mapping[str, float], tiers: Sequence[TierState]) -> None:
        self._counters = counters
        self._gauges = gauges
        self._tiers = tiers

    def collect(self) -> Iterator[Metric]:
        """All families with the values of this snapshot."""
        for item in fields(Counters):
            value = self._counters.get(item.name, 0)
            yield CounterMetricFamily(PREFIX + item.name, item.metadata["help"], value=value)
        for item in fields(Gauges):
            yield GaugeMetricFamily(PREFIX + item.name, item.metadata["help"], value=self._gauges.get(item.name, 0))
        if self._tiers:
            yield from self._collect_tiers()

    def _collect_tiers(self) -> Iterator[Metric]:
        from lmcache.cascade.guard import Counts

        for item in fields(Counts):
            counter = CounterMetricFamily(f"{PREFIX}l2_{item.name}", item.metadata["help"], labels=["l2_name"])
            for state in self._tiers:
                counter.add_metric([state.name], state.counters[item.name])
            yield counter
        for name, meaning in _TIER_GAUGES.items():
            gauge = GaugeMetricFamily(f"{PREFIX}l2_{name}", meaning, labels=["l2_name"])
            for state in self._tiers:
                value = float(state.is_up) if name == "up" else getattr(state.usage, name)
                if value is not None:
                    gauge.add_metric([state.name], value)
            yield gauge


def render(counters: Mapping[str, float], gauges: Mapping[str, float], tiers: Sequence[TierState]) -> bytes:
    """The text of ``/metrics``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(counters, gauges, tiers))
    return generate_latest(registry)
