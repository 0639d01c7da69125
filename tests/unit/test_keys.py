"""Identity: what equal keys mean, against the definition written out."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache import keys

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)


def typed(value: object) -> object:
    """A value with its types, since Python takes 1, 1.0 and True for equal."""
    return tuple(typed(item) for item in value) if isinstance(value, tuple) else (type(value), repr(value))


@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(1, 8))
def test_the_chain_is_its_definition(tokens: list[int], chunk_tokens: int) -> None:
    parent = keys.namespace({"model": "m"})
    expected = []
    for start in range(0, len(tokens) - chunk_tokens + 1, chunk_tokens):
        chunk = tokens[start : start + chunk_tokens]
        parent = hashlib.sha256(parent + struct.pack(f"<{chunk_tokens}I", *chunk)).digest()
        expected.append(parent)
    assert keys.extend(keys.namespace({"model": "m"}), keys.pack_tokens(tokens), chunk_tokens) == expected


@given(st.lists(st.integers(0, 99), min_size=12, max_size=12), st.integers(0, 3))
def test_a_chain_continued_equals_one_made_at_once(tokens: list[int], split: int) -> None:
    root = keys.namespace({})
    extras = [b"a", b"", b"c"]
    whole = keys.extend(root, keys.pack_tokens(tokens), 4, extras)
    first = keys.extend(root, keys.pack_tokens(tokens[: split * 4]), 4, extras[:split])
    parent = first[-1] if first else root
    assert first + keys.extend(parent, keys.pack_tokens(tokens[split * 4 :]), 4, extras[split:]) == whole


@given(VALUES, VALUES)
def test_different_values_have_different_encodings(one: keys.Value, other: keys.Value) -> None:
    assert (keys.encode_value(one) == keys.encode_value(other)) == (typed(one) == typed(other))


def test_a_namespace_does_not_depend_on_the_order_of_its_fields() -> None:
    assert keys.namespace({"a": 1, "b": 2}) == keys.namespace({"b": 2, "a": 1})
    assert keys.namespace({"a": 1}) != keys.namespace({"a": "1"}) != keys.namespace({"a1": None})


def test_what_has_no_stable_identity_is_refused() -> None:
    with pytest.raises(TypeError, match="no stable identity for a object"):
        keys.encode_value(object())  # type: ignore[arg-type]


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_id_that_is_none_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        keys.pack_tokens([1, token])


def test_the_seed_of_a_checksum_differs_by_key_and_rank() -> None:
    one, other = (keys.namespace({"n": number}) for number in (1, 2))
    seeds = {keys.checksum_seed(key, rank) for key in (one, other) for rank in (0, 1)}
    assert len(seeds) == 4
    assert keys.checksum_seed(b"\xff" * 32, 1) == 0


def test_the_start_of_a_request_depends_on_engine_salt_chunk_size_and_adapter() -> None:
    engine, other = keys.namespace({"a": 1}), keys.namespace({"a": 2})
    starts = [
        keys.request_namespace(engine, "", {}, 256),
        keys.request_namespace(other, "", {}, 256),
        keys.request_namespace(engine, "tenant", {}, 256),
        keys.request_namespace(engine, "", {}, 128),
        keys.request_namespace(engine, "", {"adapter": ("x", "/x", "digest")}, 256),
    ]
    assert len(set(starts)) == len(starts)
    assert starts[0] == keys.request_namespace(engine, "", {}, 256)
