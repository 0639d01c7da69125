"""XXH3-64 and the checksum of an extent, against the xxhash package."""

from __future__ import annotations

import random

import native_worlds as worlds
import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache.transfer import _native

DATA = random.Random(1).randbytes(300_000)
SEEDS = st.integers(0, 2**64 - 1)


def test_every_length_up_to_4096_hashes_as_xxhash_does() -> None:
    rng = random.Random(2)
    for length in range(4097):
        data = DATA[:length]
        assert _native.xxh3_64(data) == xxhash.xxh3_64_intdigest(data), length
        seed = rng.getrandbits(64)
        assert _native.xxh3_64(data, seed) == xxhash.xxh3_64_intdigest(data, seed=seed), (length, seed)


@settings(deadline=None)
@given(length=st.integers(0, len(DATA)), start=st.integers(0, 64), seed=SEEDS)
def test_any_length_at_any_address_hashes_as_xxhash_does(length: int, start: int, seed: int) -> None:
    data = memoryview(DATA)[start : start + length]
    assert _native.xxh3_64(data, seed) == xxhash.xxh3_64_intdigest(data, seed=seed)


@settings(deadline=None)
@given(length=st.integers(0, len(DATA)), seed=SEEDS)
def test_a_checksum_is_the_seeded_hash_of_its_leaf_hashes(length: int, seed: int) -> None:
    assert _native.checksum(DATA[:length], seed) == worlds.checksum(DATA[:length], seed)


@pytest.mark.parametrize("length", [0, 1, 16383, 16384, 16385, 32768, 32769])
def test_leaves_end_where_the_definition_ends_them(length: int) -> None:
    assert _native.checksum(DATA[:length], 5) == worlds.checksum(DATA[:length], 5)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_no_uint64_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=r"^seed must be between 0 and 2\*\*64 - 1$"):
        _native.xxh3_64(b"", seed)
    with pytest.raises(ValueError, match="seed"):
        _native.checksum(b"", seed)


def test_data_with_gaps_is_refused() -> None:
    with pytest.raises(ValueError, match="data must be a contiguous buffer"):
        _native.xxh3_64(np.zeros((4, 4), np.uint8)[:, ::2])


def test_the_engine_says_which_instruction_set_it_uses() -> None:
    assert _native.features() in ("avx512", "avx2", "portable")
