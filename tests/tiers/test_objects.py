"""The form of an object, and the options of an adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcache.errors import ConfigError
from lmcache.tiers import BUILTIN, make_tier, objects
from lmcache.tiers.objects import PAGE_BYTES, Header, NoObject, Seal
from lmcache.tiers.options import SECRETS, Options

seals = st.builds(
    Seal,
    key_id=st.binary(min_size=4, max_size=4),
    salt=st.binary(min_size=32, max_size=32),
    tag=st.binary(min_size=16, max_size=16),
)
headers = st.builds(
    Header,
    key=st.binary(min_size=32, max_size=32),
    tenant=st.binary(min_size=16, max_size=16),
    namespace=st.binary(min_size=16, max_size=16),
    layout=st.binary(min_size=8, max_size=8),
    extent_bytes=st.integers(1, 1 << 40),
    checksums=st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=600).map(tuple),
    seal=st.none() | seals,
)
PLAIN = objects.encode(Header(bytes(32), bytes(16), bytes(16), bytes(8), 5000, (1, 2)))


@given(headers)
def test_a_header_is_whole_pages_and_comes_back(header: Header) -> None:
    data = objects.encode(header)
    ranks = len(header.checksums)
    assert len(data) == objects.header_bytes(ranks)
    assert len(data) % PAGE_BYTES == 0
    assert objects.decode(data) == header
    assert objects.decode(memoryview(data + b"more")) == header
    assert header.num_bytes == len(data) + ranks * objects.padded(header.extent_bytes)
    assert objects.padded_extent_bytes(header.num_bytes, ranks) == objects.padded(header.extent_bytes)


@given(headers, st.data())
def test_a_header_with_any_bit_flipped_is_none(header: Header, data: st.DataObject) -> None:
    whole = bytearray(objects.encode(header))
    meant_bytes = 112 + 8 * len(header.checksums) + (48 if header.seal else 0) + 4
    bit = data.draw(st.integers(0, meant_bytes * 8 - 1))
    whole[bit // 8] ^= 1 << bit % 8
    with pytest.raises(NoObject):
        objects.decode(whole)


@given(st.binary(max_size=300), st.integers(0, len(PLAIN)))
def test_no_bytes_make_the_reader_fail_otherwise_than_by_its_own_error(tail: bytes, cut: int) -> None:
    for data in (tail, PLAIN[:cut] + tail):
        try:
            found = objects.decode(data)
        except NoObject:
            continue
        assert objects.encode(found)[:120] == PLAIN[:120]


def test_the_largest_number_of_ranks_is_a_bound() -> None:
    header = Header(bytes(32), bytes(16), bytes(16), bytes(8), 1, (7,) * objects.RANKS_MAX)
    assert objects.decode(objects.encode(header)) == header
    too_many = Header(bytes(32), bytes(16), bytes(16), bytes(8), 1, (7,) * (objects.RANKS_MAX + 1))
    with pytest.raises(NoObject):
        objects.decode(objects.encode(too_many))


@pytest.mark.parametrize(
    ("object_bytes", "ranks"),
    [(0, 1), (PAGE_BYTES, 1), (PAGE_BYTES + 1, 1), (PAGE_BYTES * 2, 2), (PAGE_BYTES * 4, 2), (PAGE_BYTES * 3 - 8, 1)],
)
def test_a_length_that_no_object_can_have_is_told(object_bytes: int, ranks: int) -> None:
    assert objects.padded_extent_bytes(object_bytes, ranks) is None


def test_options_are_read_checked_and_used_up(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("hunter2\nsecond line\n")
    options = Options(
        {
            "type": "some",
            "text": "a",
            "flag": False,
            "whole": 3,
            "number": 2,
            "table": {"a": 1},
            "password_file": str(tmp_path / "secret"),
        }
    )
    assert (options.type, options.text("text"), options.flag("flag", True)) == ("some", "a", False)
    assert (options.integer("whole", 1, 1, 3), options.number("number", None, 0, 2)) == (3, 2.0)
    assert (options.table("table"), options.table("other"), options.text("other", "b")) == ({"a": 1}, {}, "b")
    assert options.secret("password") == "hunter2"
    assert options.secret("token") is None
    options.finish()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"type": "file", "capacity_gb": 1}, "'base_path' is missing"),
        ({"type": "file", "base_path": "x"}, "'capacity_gb' is missing"),
        ({"type": "file", "base_path": 7, "capacity_gb": 1}, "'base_path' is a string"),
        ({"type": "file", "base_path": "x", "capacity_gb": "1"}, "'capacity_gb' is a number"),
        ({"type": "file", "base_path": "x", "capacity_gb": True}, "'capacity_gb' is a number"),
        ({"type": "file", "base_path": "x", "capacity_gb": float("nan")}, "'capacity_gb' is a number"),
        ({"type": "file", "base_path": "x", "capacity_gb": 0}, "'capacity_gb' is a number"),
        ({"type": "file", "base_path": "x", "capacity_gb": 1, "threads": 0}, "'threads' is 1 to 64"),
        ({"type": "file", "base_path": "x", "capacity_gb": 1, "threads": True}, "'threads' is"),
        ({"type": "file", "base_path": "x", "capacity_gb": 1, "thread": 1}, "unknown option 'thread'"),
        ({"type": "memory"}, "'capacity_gb' is missing"),
        ({"type": "null", "capacity_gb": 1}, "unknown option 'capacity_gb'"),
        ({"type": "no-such"}, "unknown type 'no-such'"),
        ({}, "unknown type ''"),
    ],
)
def test_what_is_wrong_with_the_options_is_one_sentence(values: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError) as raised:
        make_tier(values)
    assert reason in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_type_is_told_the_known_ones() -> None:
    with pytest.raises(ConfigError) as raised:
        make_tier({"type": "no-such"})
    assert all(name in str(raised.value) for name in BUILTIN)


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_that_cannot_be_read_is_told_by_its_place(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
        Options({"type": "some", f"{name}_env": "NO_SUCH_VARIABLE"}).secret(name)
    with pytest.raises(ConfigError, match="absent"):
        Options({"type": "some", f"{name}_file": str(tmp_path / "absent")}).secret(name)
