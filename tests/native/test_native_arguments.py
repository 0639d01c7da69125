"""Every argument that does not fit is refused with a sentence before a byte moves."""

from __future__ import annotations

from typing import Any

import native_worlds as worlds
import numpy as np
import pytest

from lmcache.transfer import _native

BIG = 2**64 - 1


def arguments() -> dict[str, Any]:
    """A plan that is right: two chunks of two blocks each."""
    world = worlds.World([4096, 100], 4, [(2, 0), (3, 1)])
    return {
        "world": world,
        "pool": world.pool,
        "segments": world.segments,
        "num_blocks": world.num_blocks,
        "blocks": world.blocks,
        "offsets": world.offsets,
        "seeds": world.seeds,
        "checksums": np.array(world.checksums(), np.uint64),
        "threads": 1,
    }


def call(verb: str, given: dict[str, Any]) -> bytes:
    names = ["pool", "segments", "num_blocks", "blocks", "offsets", "seeds", "threads"]
    if verb == "retrieve":
        names.insert(-1, "checksums")
    result: bytes = getattr(_native, verb)(**{name: given[name] for name in names})
    return result


def table(*rows: tuple[int, int, int]) -> Any:
    return np.array(rows, np.uint64)


ADDRESS = 1 << 20

WRONG: list[tuple[str, Any, str]] = [
    ("segments", b"", "at least one segment"),
    ("segments", b"\0" * 23, "no multiple of 24"),
    ("segments", np.zeros(6, np.float64), "64-bit integers"),
    ("segments", np.zeros((3, 3), np.int32), "64-bit integers"),
    ("segments", np.zeros(6, ">u8"), "native byte order"),
    ("segments", np.zeros((2, 6), np.uint64)[:, ::2], "contiguous"),
    ("segments", table((0, 64, 64)), "null address"),
    ("segments", table((ADDRESS, 64, 0)), "no bytes"),
    ("segments", table((ADDRESS, 63, 64)), "longer than the distance"),
    ("segments", table((ADDRESS, 2**63, 64)), "beyond the address space"),
    ("segments", table((BIG - 64, 64, 64)), "beyond the address space"),
    ("segments", table((ADDRESS, BIG, BIG)), "beyond the address space"),
    ("num_blocks", 0, "num_blocks must be at least 1"),
    ("num_blocks", -1, "num_blocks must be between"),
    ("num_blocks", 2**70, "num_blocks must be between"),
    ("num_blocks", 3, "block id 3 is not among 3 blocks"),
    ("blocks", np.array([[2, 0], [4, 1]]), "block id 4 is not among 4 blocks"),
    ("blocks", np.array([[2, 0], [-2, 1]]), "block id -2"),
    ("blocks", np.array([2, 0, 3]), "3 block ids do not divide into 2 chunks"),
    ("blocks", np.zeros(0, np.int64), "do not divide"),
    ("offsets", np.zeros(0, np.uint64), "seeds"),
    ("offsets", np.zeros(3, np.uint64), "3 offsets but 2 seeds"),
    ("offsets", np.array([0, 10**6], np.uint64), "outside the pool"),
    ("offsets", np.array([0, BIG], np.uint64), "outside the pool"),
    ("seeds", np.zeros(1, np.uint64), "2 offsets but 1 seeds"),
    ("threads", 0, "threads must be between 1 and 256"),
    ("threads", 257, "threads must be between 1 and 256"),
    ("threads", -1, "threads must be between"),
    ("pool", b"", "outside the pool"),
]


@pytest.mark.parametrize("verb", ["store", "retrieve"])
@pytest.mark.parametrize(("name", "value", "sentence"), WRONG, ids=[f"{name}-{text}" for name, _, text in WRONG])
def test_a_wrong_argument_is_refused(verb: str, name: str, value: Any, sentence: str) -> None:
    given = arguments()
    if name == "pool" and verb == "store":
        value = bytearray(value)
    given[name] = value
    before = given["world"].pool.copy()
    with pytest.raises(ValueError, match=sentence):
        call(verb, given)
    assert np.array_equal(given["world"].pool, before)


def test_the_plan_that_the_wrong_ones_are_made_from_is_right() -> None:
    given = arguments()
    assert call("retrieve", given) == b"\1\1"
    assert len(call("store", given)) == 16


def test_a_store_never_reads_a_block_of_minus_one() -> None:
    given = arguments()
    given["blocks"] = np.array([[2, 0], [3, -1]])
    with pytest.raises(ValueError, match="block id -1"):
        call("store", given)


def test_a_store_into_memory_that_is_not_writable_is_refused() -> None:
    given = arguments()
    given["pool"] = bytes(given["pool"])
    with pytest.raises(ValueError, match="pool must be a writable"):
        call("store", given)


def test_a_store_into_one_extent_twice_is_refused() -> None:
    given = arguments()
    given["offsets"] = np.array([8, 0], np.uint64)
    with pytest.raises(ValueError, match="offsets 0 and 8 overlap"):
        call("store", given)


def test_a_retrieve_into_one_block_twice_is_refused() -> None:
    given = arguments()
    given["blocks"] = np.array([[2, 0], [0, 1]])
    with pytest.raises(ValueError, match="block 0 would be written twice"):
        call("retrieve", given)


def test_checksums_must_be_one_a_chunk() -> None:
    given = arguments()
    given["checksums"] = given["checksums"][:1]
    with pytest.raises(ValueError, match="2 offsets but 1 checksums"):
        call("retrieve", given)


def test_tables_may_be_raw_bytes_and_numbers_may_be_numpys() -> None:
    given = arguments()
    for name in ("segments", "blocks", "offsets", "seeds", "checksums"):
        given[name] = given[name].tobytes()
    given["num_blocks"] = np.int64(4)
    given["threads"] = np.uint8(2)
    assert call("retrieve", given) == b"\1\1"
