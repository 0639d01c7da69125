"""What the measuring reader makes of an answer's bytes, however they are cut into segments; no socket between."""

from __future__ import annotations

import asyncio
import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_cli.bench.exchange import Exchange


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields, ensure_ascii=False).encode() + b"\n\n"


def choice(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}


def chunked(parts: list[bytes]) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts if part) + b"0\r\nX-Trailer: y\r\n\r\n"


def read(segments: list[bytes], is_reset: bool = False) -> tuple[Any, ...]:
    """All but the times of what a connection's bytes come to, and the time of each text, by segment."""

    async def run() -> tuple[Any, ...]:
        ticks = itertools.count()
        exchange = Exchange("http://engine", 1e6, lambda: float(next(ticks)), lambda: 0.0)
        for segment in segments:
            for start in range(0, len(segment), 65536):
                part = segment[start : start + 65536]
                exchange.get_buffer(-1)[: len(part)] = part
                exchange.buffer_updated(len(part))
        if not is_reset:
            exchange.eof_received()
        exchange.connection_lost(ConnectionResetError() if is_reset else None)
        failure = await exchange.ended
        assert list(exchange.text_s) == sorted(exchange.text_s)
        return failure, exchange.text, len(exchange.text_s), exchange.usage

    return asyncio.run(run())


def cut(data: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(edges) if start < end]


PLACES = st.lists(st.integers(0, 10_000), max_size=30)


@settings(deadline=None)
@given(
    st.lists(st.text(max_size=8), max_size=6),
    st.booleans(),
    st.sampled_from(["chunked", "length", "close"]),
    PLACES,
    PLACES,
    st.booleans(),
)
def test_an_answer_means_the_same_however_its_bytes_are_cut(
    texts: list[str], has_done: bool, framing: str, chunks: list[int], places: list[int], is_reset: bool
) -> None:
    events = [event(choices=[choice(text)]) for text in texts]
    events += [event(choices=[choice("", "stop")]), event(choices=[], usage={"completion_tokens": len(texts)})]
    body = b": hello\n\n" + b"".join(events) + (b"data: [DONE]\n\n" if has_done else b"")
    head, framed = {
        "chunked": (b"Transfer-Encoding: chunked\r\n", chunked(cut(body, chunks))),
        "length": (b"Content-Length: %d\r\n" % len(body), body),
        "close": (b"", body),
    }[framing]
    answer = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + framed
    whole = read([answer], is_reset)
    assert read(cut(answer, places), is_reset) == whole
    assert read([answer[index : index + 1] for index in range(len(answer))], is_reset) == whole
    shown = [text for text in texts if text]
    assert whole[1:3] == (shown, len(shown))
    is_whole = has_done or framing != "close" or not is_reset
    expected = ("no_text" if not shown else None) if is_whole else "cut_short"
    assert (whole[0] and whole[0].cause) == expected


@settings(deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]),
    PLACES,
)
def test_any_bytes_at_all_come_to_one_and_the_same_end(data: bytes, head: bytes, places: list[int]) -> None:
    failure = read([head + data])[0]
    assert failure is not None
    assert read(cut(head + data, places))[0] == failure


@pytest.mark.parametrize(
    "usage",
    [None, 5, [], {"prompt_tokens": "7"}, {"prompt_tokens": -1}, {"prompt_tokens": True}, {"prompt_tokens": 7.5}],
)
def test_usage_of_the_wrong_kind_counts_as_absent(usage: Any) -> None:
    data = event(choices=[choice("a")], usage=usage) + b"data: [DONE]\n\n"
    failure, _, _, read_usage = read([b"HTTP/1.1 200 OK\r\n\r\n" + data])
    assert failure is None
    assert read_usage.prompt_tokens is None


def test_the_last_usage_counts() -> None:
    data = b"".join(event(choices=[choice("a")], usage={"completion_tokens": n}) for n in (1, 2, 3))
    assert read([b"HTTP/1.1 200 OK\r\n\r\n" + data + b"data: [DONE]\n\n"])[3].output_tokens == 3
