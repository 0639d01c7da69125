"""The fuzz targets on their seeds and on some thousand mutations of them: the part of fuzzing that needs no library.

With coverage to guide it and for as long as you like: ``python fuzz/run.py --seconds 600``.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fuzz"))

from targets import seeds

MUTATIONS = 1500
TARGETS = seeds()


@pytest.mark.parametrize(("target", "inputs"), TARGETS.values(), ids=TARGETS)
def test_mutated_inputs_are_refused_or_read_but_never_anything_else(
    target: Callable[[bytes], None], inputs: list[bytes]
) -> None:
    source = random.Random(29)
    for data in inputs:
        target(data)
        for end in range(0, len(data), max(1, len(data) // 100)):
            target(data[:end])
    for _ in range(MUTATIONS):
        target(mutated(source.choice(inputs), inputs, source))


def mutated(data: bytes, others: list[bytes], source: random.Random) -> bytes:
    """Some bytes changed, cut out, repeated, or taken from another input."""
    changed = bytearray(data)
    for _ in range(source.randrange(1, 6)):
        at = source.randrange(len(changed) + 1)
        match source.randrange(5):
            case 0 if changed:
                changed[at % len(changed)] = source.choice([0, 1, 0x7F, 0x80, 0xC1, 0xDD, 0xFF, source.randrange(256)])
            case 1:
                del changed[at : at + source.randrange(1, 20)]
            case 2:
                changed[at:at] = source.choice(others)[: source.randrange(40)]
            case 3:
                changed[at:at] = changed[at : at + 30] * source.randrange(1, 5)
            case _:
                changed[at:at] = source.randbytes(source.randrange(1, 9))
    return bytes(changed)
