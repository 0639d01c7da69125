"""Do two samples come from one distribution? Mann and Whitney's test, in the standard library alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

Z95 = 1.959964


@dataclass(frozen=True)
class Separation:
    """How far two samples can be told apart.

    Attributes:
        p_value: two-sided, of Mann-Whitney's U by the normal approximation, with corrections for ties and continuity;
            good from about 8 values a side.
        auc: probability that a value of the first sample is above one of the second, ties counted half: 0.5 is no
            effect, 0 and 1 are complete separation.
        auc_low, auc_high: its 95 % interval (Hanley and McNeil).
        shift: Hodges and Lehmann's: median of all differences first - second, in the unit of the samples.
    """

    p_value: float
    auc: float
    auc_low: float
    auc_high: float
    shift: float


def separation(first: Sequence[float], second: Sequence[float]) -> Separation:
    """Compare two samples of at least one value each."""
    n, m = len(first), len(second)
    u = sum(_ranks([*first, *second])[:n]) - n * (n + 1) / 2
    auc = u / (n * m)
    low, high = _interval(auc, n, m)
    shift = statistics.median(a - b for a in first for b in second)
    return Separation(_p_value(u, n, m, [*first, *second]), auc, low, high, shift)


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1 up; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in range(start, end + 1):
            ranks[order[place]] = (start + end) / 2 + 1
        start = end + 1
    return ranks


def _p_value(u: float, n: int, m: int, values: Sequence[float]) -> float:
    total = n + m
    counts = [values.count(value) for value in set(values)]
    ties = sum(count**3 - count for count in counts) / (total * (total - 1))
    variance = n * m / 12 * (total + 1 - ties)
    if variance <= 0:  # all values are the same
        return 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def _interval(auc: float, n: int, m: int) -> tuple[float, float]:
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = (auc * (1 - auc) + (n - 1) * (q1 - auc**2) + (m - 1) * (q2 - auc**2)) / (n * m)
    half = Z95 * math.sqrt(max(variance, 0.0))
    return max(0.0, auc - half), min(1.0, auc + half)
