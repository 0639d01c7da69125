"""The native packing of token ids is the one that keys are defined by."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache import keys
from lmcache.transfer import _native


@given(st.lists(st.integers(0, 2**32 - 1)))
def test_packed_tokens_are_those_of_the_definition(tokens: list[int]) -> None:
    assert _native.pack_tokens(tokens) == keys.pack_tokens(tokens)


@pytest.mark.parametrize("token", [-1, 2**32, 2**64, -(2**70)])
def test_an_id_that_is_none_is_an_overflow(token: int) -> None:
    with pytest.raises(OverflowError, match="between 0 and"):
        _native.pack_tokens([1, token])


@pytest.mark.parametrize("item", ["1", 1.0, None, True])
def test_an_item_that_is_no_int_is_refused(item: object) -> None:
    with pytest.raises(TypeError, match="a token id is an int"):
        _native.pack_tokens([item])  # type: ignore[list-item]
