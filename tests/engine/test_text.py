"""Pieces of a stream joined are the whole text, cut at the first stop string."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lmcache.engine.models import ByteTokenizer
from lmcache.engine.text import TextStream

decode = ByteTokenizer().decode


def pieces(tokens: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    """What a stream gives out for these tokens, and whether a stop string ended it."""
    stream = TextStream(decode, stops)
    given_out = []
    for token in tokens:
        given_out.append(stream.push(token))
        if stream.stopped:
            return given_out, True
    return [*given_out, stream.finish()], stream.stopped


@given(st.text(max_size=60))
def test_text_comes_whole_and_no_character_is_cut(text: str) -> None:
    tokens = ByteTokenizer().encode(text)  # what UTF-8 cannot write is a question mark here
    got, stopped = pieces(tokens)
    assert "".join(got) == decode(tokens)
    assert not stopped
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in got)


@given(st.lists(st.integers(0, 256), max_size=60))
def test_any_bytes_come_through_and_never_raise(tokens: list[int]) -> None:
    got, _ = pieces(tokens)
    assert len(got) == len(tokens) + 1
    ascii_tokens = bytes(token for token in tokens if token < 128)
    assert "".join(c for c in "".join(got) if ord(c) < 128).encode() == ascii_tokens


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_a_stop_string_cuts_at_its_first_place(text: str, stops: list[str]) -> None:
    got, stopped = pieces(list(text.encode()), tuple(stops))
    ends = [at + len(stop) for stop in stops if (at := text.find(stop)) >= 0]
    assert stopped == bool(ends)
    seen = text[: min(ends)] if ends else text
    starts = [at for stop in stops if (at := seen.find(stop)) >= 0]
    assert "".join(got) == (seen[: min(starts)] if starts else seen)


@given(st.text(max_size=40))
def test_the_letters_before_each_token_are_counted(text: str) -> None:
    stream = TextStream(decode)
    tokens = ByteTokenizer().encode(text)
    for position, token in enumerate(tokens):
        if decode(tokens[:position]) + decode(tokens[position:]) == decode(tokens):  # no letter is cut here
            assert stream.num_letters == len(decode(tokens[:position]))
        stream.push(token)
    stream.finish()
    assert stream.num_letters == len(decode(tokens))
