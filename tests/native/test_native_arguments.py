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
    world = worlds.World.of_runs([4096, 100], 4, [(2, 0), (3, 1)])
    return {
        "world": world,
        "pool": world.pool,
        "planes": world.planes,
        "groups": world.group_rows,
        "blocks": world.blocks,
        "offsets": world.offsets,
        "seeds": world.seeds,
        "checksums": np.array(world.checksums(), np.uint64),
        "threads": 1,
    }


def call(verb: str, given: dict[str, Any]) -> bytes:
    names = ["pool", "planes", "groups", "blocks", "offsets", "seeds", "threads"]
    if verb == "retrieve":
        names.insert(-1, "checksums")
    result: bytes = getattr(_native, verb)(**{name: given[name] for name in names})
    return result


def planes(address: int, block_stride: int, run: int, *dims: int) -> Any:
    """A table of two planes, the second of which is right."""
    dims = dims or (1, 0, 1, 0, 1, 0)
    return np.array([[address, block_stride, *dims, run], [ADDRESS, 100, 1, 0, 1, 0, 1, 0, 100]], np.uint64)


ADDRESS = 1 << 20

WRONG: list[tuple[str, Any, str]] = [
    ("planes", b"", "more planes than there are"),
    ("planes", b"\0" * 71, "no multiple of 72"),
    ("planes", np.zeros(18, np.float64), "64-bit integers"),
    ("planes", np.zeros((2, 9), np.int32), "64-bit integers"),
    ("planes", np.zeros(18, ">u8"), "native byte order"),
    ("planes", np.zeros((2, 18), np.uint64)[:, ::2], "contiguous"),
    ("planes", planes(0, 64, 64), "plane 0 has a null address"),
    ("planes", planes(ADDRESS, 64, 0), "plane 0 has no bytes"),
    ("planes", planes(ADDRESS, 63, 64), "plane 0 has runs that overlap"),
    ("planes", planes(ADDRESS, BIG - 62, 64), "plane 0 has runs that overlap"),
    ("planes", planes(ADDRESS, 2**62, 64), "beyond the address space"),
    ("planes", planes(BIG - 64, 64, 64), "beyond the address space"),
    ("planes", planes(64, BIG - 63, 64), "beyond the address space"),
    ("planes", planes(ADDRESS, 2**63 - 1, 2**63 - 1), "beyond the address space"),
    ("planes", planes(ADDRESS, 64, 64, 0, 64, 1, 0, 1, 0), "counts nothing"),
    ("planes", planes(ADDRESS, 64, 64, 1, 0, 2, 32, 1, 0), "runs that overlap"),
    ("planes", planes(ADDRESS, 64, 64, 1, 0, 1, 0, 2**60, 2**60), "beyond the address space"),
    ("planes", planes(ADDRESS, 64, 64, 2**40, 64, 2**40, 64, 1, 0), "beyond the address space"),
    ("groups", b"", "at least one group"),
    ("groups", np.array([[1, 4, 2]], np.uint64), "2 planes, but the groups have 1"),
    ("groups", np.array([[3, 4, 2]], np.uint64), "more planes than there are"),
    ("groups", np.array([[BIG, 4, 2]], np.uint64), "more planes than there are"),
    ("groups", np.array([[0, 4, 2]], np.uint64), "or one has none"),
    ("groups", np.array([[2, 0, 2]], np.uint64), "a group has no block"),
    ("groups", np.array([[2, 4, 0]], np.uint64), "no block of a group"),
    ("groups", np.array([[2, 4, BIG]], np.uint64), "longer than the address space"),
    ("groups", np.array([[2, 3, 2]], np.uint64), "block id 3 is not among 3 blocks"),
    ("groups", np.array([[1, 4, 1], [1, 1, 1]], np.uint64), "block id 1 is not among 1 blocks"),
    ("blocks", np.array([[2, 0], [4, 1]]), "block id 4 is not among 4 blocks"),
    ("blocks", np.array([[2, 0], [-2, 1]]), "block id -2"),
    ("blocks", np.array([2, 0, 3]), "3 block ids are not 2 for each of 2 chunks"),
    ("blocks", np.zeros(0, np.int64), "0 block ids are not 2"),
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
    for name in ("planes", "groups", "blocks", "offsets", "seeds", "checksums"):
        given[name] = given[name].tobytes()
    given["threads"] = np.uint8(2)
    assert call("retrieve", given) == b"\1\1"
