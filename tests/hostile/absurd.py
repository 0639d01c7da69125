"""Values that no client of ours would put into a message."""

from __future__ import annotations

import random
from typing import Any

NUMBERS = [-1, 0, 1, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def absurd(kind: Any, source: random.Random) -> Any:
    """A value of a field's type, or of none."""
    if source.random() < 0.02:
        return source.choice([None, [], {}, "x", b"x", 1.5])
    if kind is bytes:
        return source.randbytes(source.choice([0, 1, 7, 8, 16, 31, 32, 33, 64, 40, 8192]))
    if kind is bool:
        return source.random() < 0.5
    if kind is float:
        return source.choice([0.0, -1.0, 1e308, float("inf"), float("nan")])
    if kind is int:
        return source.choice(NUMBERS)
    if kind is str:
        return source.choice(["worker", "scheduler", "", "\0", "ü" * 2000])
    return []
