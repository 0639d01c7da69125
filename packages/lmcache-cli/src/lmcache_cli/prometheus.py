"""Prometheus' text format, as far as counters and gauges of one server need it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(\{.*\})?\s+(\S+)")


def samples(text: str) -> Iterator[tuple[str, str, float]]:
    """Every sample as (name, labels as written, value); what is no finite sample is left out."""
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        if math.isfinite(value):
            yield match[1], match[2] or "", value
