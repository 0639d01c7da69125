"""When the requests of an open loop are due: seconds from the start, ascending, without end."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator


def arrivals(kind: str, rate_per_s: float, seed: int) -> Iterator[float]:
    """Due times at ``rate_per_s`` in the long run.

    Args:
        kind: `constant` (evenly spaced), `poisson` (independent of each other: exponential gaps, the first one
            included) or `burst` (all of a second's requests at its start).
        seed: of `poisson`.
    """
    if kind == "poisson":
        chance = random.Random(repr((seed, "arrivals")))
        due_s = 0.0
        while True:
            due_s += chance.expovariate(rate_per_s)
            yield due_s
    for index in itertools.count():
        even_s = index / rate_per_s
        yield even_s if kind == "constant" else float(math.floor(even_s + 1e-9))  # 7 / 0.07 is 99.99999999999999
