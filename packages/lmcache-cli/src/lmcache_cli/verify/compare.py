"""Are two greedy answers the same? Tokens first; where they part, whether it was a tie that rounding may decide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmcache_cli.verify.greedy import Answer

EQUAL = "equal"
CLOSE = "close"
DIFFERENT = "different"
_RANK = (EQUAL, CLOSE, DIFFERENT)


@dataclass(frozen=True)
class Comparison:
    """How one answer relates to another.

    Attributes:
        kind: EQUAL: the same tokens, and first-token log probabilities within the tolerance; CLOSE: the tokens part at
            a position where both choices were within the tolerance of each other in both answers; else DIFFERENT.
        position: of the first token that differs (of the first letter, where the engine names no tokens).
        expected, got: the text there.
        logprob_difference: the largest difference among the first token's likeliest; None where not told.
    """

    kind: str
    position: int | None = None
    expected: str | None = None
    got: str | None = None
    logprob_difference: float | None = None


def compare(reference: Answer, other: Answer, tolerance: float) -> Comparison:
    """Compare ``other`` with ``reference``; ``tolerance`` is of natural logarithms."""
    difference = first_difference(reference, other)
    is_near = difference is None or difference <= tolerance
    a: Sequence[str] = reference.text
    b: Sequence[str] = other.text
    if reference.pieces is not None and other.pieces is not None:
        a, b = reference.pieces, other.pieces
    position = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    if position is None and len(a) != len(b):
        position = min(len(a), len(b))
    if position is None:
        return Comparison(EQUAL if is_near else DIFFERENT, logprob_difference=difference)
    kind = CLOSE if is_near and _is_tie(reference, other, position, tolerance) else DIFFERENT
    expected, got = ("".join(side[position : position + 1]) for side in (a, b))
    return Comparison(kind, position, expected, got, difference)


def nearest(references: Sequence[Answer], other: Answer, tolerance: float) -> Comparison:
    """The best of the comparisons with each of ``references``."""
    found = [compare(reference, other, tolerance) for reference in references]
    return min(found, key=lambda each: (_RANK.index(each.kind), each.logprob_difference or 0.0))


def first_difference(a: Answer, b: Answer) -> float | None:
    """The largest difference of log probabilities at the first token.

    A token that only one side lists is at least as unlikely on the other as the least likely listed there, so the
    difference counts from that.
    """
    if not a.top or not b.top or not a.top[0] or not b.top[0]:
        return None
    first, second = a.top[0], b.top[0]
    return max(_gap(first, second), _gap(second, first))


def _gap(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    least = min(other.values())
    gaps = [abs(value - other[name]) if name in other else max(0.0, value - least) for name, value in one.items()]
    return max(gaps)


def _is_tie(a: Answer, b: Answer, position: int, tolerance: float) -> bool:
    if a.pieces is None or b.pieces is None or a.top is None or b.top is None:
        return False
    if position >= min(len(a.top), len(b.top)):
        return False
    names = a.pieces[position], b.pieces[position]
    for top in (a.top[position], b.top[position]):
        values = [top.get(name, -math.inf) for name in names]
        if not all(map(math.isfinite, values)) or abs(values[0] - values[1]) > tolerance:
            return False
    return True
