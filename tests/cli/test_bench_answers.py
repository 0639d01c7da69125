"""One measured request against a scripted engine: good answers, and every way in which an answer can go wrong."""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_engine import MODEL, Behaviour, ScriptedEngine

from lmcache_cli.bench import sse
from lmcache_cli.bench.base import CANCELLED, Outcome, Request
from lmcache_cli.bench.stream import measure
from lmcache_cli.target import Target

ASKED = Request("r0", ({"role": "user", "content": "one two three"},), 16)


def ask(url: str, timeout_s: float = 20.0, **options: Any) -> Outcome:
    target = Target(url, timeout_s, headers={"X-Test": "1"})
    return asyncio.run(asyncio.wait_for(measure(target, ASKED, model=MODEL, **options), 60))


def test_a_good_answer_is_measured_piece_by_piece() -> None:
    with ScriptedEngine(Behaviour(texts=("Hel", "lo"), gap_s=0.01, cached_tokens=5)) as engine:
        outcome = ask(engine.url, body_extras={"ignore_eos": True})
        (asked,) = engine.asked()
    assert outcome.failure is None
    assert outcome.text == "Hello"
    assert (outcome.output_tokens, outcome.cached_tokens, outcome.num_attempts) == (2, 5, 1)
    assert len(outcome.text_s) == len(asked.text_s) == 2
    assert outcome.sent_s <= outcome.text_s[0] <= outcome.text_s[1] <= outcome.end_s
    assert asked.body["ignore_eos"] is True
    assert asked.body["stream_options"] == {"include_usage": True}
    assert (asked.headers["x-test"], asked.body["temperature"]) == ("1", 0)


@pytest.mark.skipif(sys.platform != "linux", reason="one clock for all processes")
def test_no_text_arrives_before_it_was_written() -> None:
    with ScriptedEngine(Behaviour(texts=("a",), repeat=50, gap_s=0.002)) as engine:
        outcome = ask(engine.url)
        (asked,) = engine.asked()
    assert len(outcome.text_s) == len(asked.text_s) == 50
    assert all(arrived >= written for arrived, written in zip(outcome.text_s, asked.text_s, strict=True))


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_every_framing_carries_the_same_answer(framing: str, together: int, line_end: str) -> None:
    with ScriptedEngine(Behaviour(framing=framing, together=together, line_end=line_end)) as engine:
        outcome = ask(engine.url)
    assert (outcome.failure, outcome.text, outcome.output_tokens) == (None, "Hello world", 3)


def test_reasoning_counts_for_the_time_and_not_for_the_text() -> None:
    with ScriptedEngine(
        Behaviour(texts=({"reasoning_content": "hm"}, {"reasoning": "so"}, "yes"), gap_s=0.01)
    ) as engine:
        outcome = ask(engine.url)
    assert (outcome.text, len(outcome.text_s)) == ("yes", 3)


def test_a_finish_reason_without_done_is_an_end_and_neither_is_none() -> None:
    with ScriptedEngine(Behaviour(done=False), Behaviour(done=False, finish_reason=None)) as engine:
        assert ask(engine.url).failure is None
        failure = ask(engine.url).failure
    assert failure is not None
    assert failure.cause == "cut_short"


def test_without_usage_nothing_is_made_up() -> None:
    with ScriptedEngine(Behaviour(usage=False)) as engine:
        outcome = ask(engine.url)
    assert outcome.failure is None
    assert (outcome.prompt_tokens, outcome.output_tokens, outcome.cached_tokens, outcome.tpot_s) == (None,) * 4


@pytest.mark.parametrize(
    ("behaviour", "cause", "said", "pieces"),
    [
        (Behaviour(status=503, body='{"detail": "overloaded"}'), "http_503", "overloaded", 0),
        (Behaviour(status=401, body='{"error": {"message": "bad key"}}'), "http_401", "bad key", 0),
        (Behaviour(body="<html>log in</html>", content_type="text/html"), "bad_answer", "", 0),
        (Behaviour(body='{"choices": []}'), "bad_answer", "", 0),
        (Behaviour(raw="SSH-2.0-OpenSSH\r\n"), "bad_answer", "", 0),
        (Behaviour(texts=()), "no_text", "", 0),
        (Behaviour(error_after=1), "engine_error", "fell off the bus", 1),
        (Behaviour(die_after=-1), "cut_short", "", 0),
        (Behaviour(die_after=2, gap_s=0.05), "cut_short", "", 2),
    ],
)
def test_what_goes_wrong_is_named_and_what_came_before_is_kept(
    behaviour: Behaviour, cause: str, said: str, pieces: int
) -> None:
    with ScriptedEngine(behaviour) as engine:
        outcome = ask(engine.url)
    assert outcome.failure is not None
    assert (outcome.failure.cause, len(outcome.text_s)) == (cause, pieces)
    assert said in outcome.failure.message
    assert "\n" not in outcome.failure.message


@pytest.mark.parametrize(("hang_after", "pieces"), [(-1, 0), (0, 0), (2, 2)])
@pytest.mark.parametrize("comments_s", [None, 0.05])
def test_silence_is_given_up_also_where_comments_keep_it_alive(
    hang_after: int, pieces: int, comments_s: float | None
) -> None:
    with ScriptedEngine(Behaviour(hang_after=hang_after, comments_s=comments_s)) as engine:
        outcome = ask(engine.url, timeout_s=0.4)
    assert outcome.failure is not None
    assert (outcome.failure.cause, len(outcome.text_s)) == ("timeout", pieces)


def test_nobody_there() -> None:
    outcome = ask("http://127.0.0.1:1")
    assert outcome.failure is not None
    assert outcome.failure.cause == "unreachable"


def test_retries_are_counted_and_measured_from_the_first_send() -> None:
    refusing = Behaviour(status=503, body="{}")
    with ScriptedEngine(refusing, Behaviour()) as engine:
        assert ask(engine.url).num_attempts == 1
    with ScriptedEngine(refusing, Behaviour()) as engine:
        outcome = ask(engine.url, retries=1)
        first, second = engine.asked()
    assert (outcome.failure, outcome.num_attempts) == (None, 2)
    assert outcome.sent_s <= first.arrived_s < second.arrived_s <= outcome.text_s[0]
    with ScriptedEngine(Behaviour(die_after=1, gap_s=0.05), Behaviour()) as engine:
        assert ask(engine.url, retries=3).num_attempts == 1  # an answer that has begun is not asked for again


def test_cancelled_it_says_what_it_has() -> None:
    async def cancelled(url: str) -> Outcome:
        task = asyncio.ensure_future(measure(Target(url, 60), ASKED, model=MODEL))
        await asyncio.sleep(0.5)
        task.cancel()
        return await asyncio.wait_for(task, 20)

    with ScriptedEngine(Behaviour(hang_after=2)) as engine:
        outcome = asyncio.run(cancelled(engine.url))
    assert outcome.failure is not None
    assert (outcome.failure.cause, len(outcome.text_s)) == (CANCELLED, 2)


def test_many_at_once_do_not_mix() -> None:
    async def all_of_them(url: str) -> list[Outcome]:
        requests = [Request(f"r{i}", ({"role": "user", "content": "x"},), 5) for i in range(32)]
        return await asyncio.gather(*(measure(Target(url, 30), request, model=MODEL) for request in requests))

    with ScriptedEngine(*[Behaviour(texts=(f"<{i}>",), repeat=5, gap_s=0.003) for i in range(32)]) as engine:
        outcomes = asyncio.run(all_of_them(engine.url))
    assert sorted(o.text for o in outcomes) == sorted(f"<{i}>" * 5 for i in range(32))
    assert all(o.failure is None for o in outcomes)


STREAM = (
    b'data: {"choices":[{"delta":{"content":"a\xe2\x80\xa8b"}}]}\r\n\r\n: still here\n\nevent: x\ndata:{"a":1}\n\n'
    b'data: {"choices":[]}\n\ndata: [DONE]\n\n'
)


@given(st.lists(st.integers(0, len(STREAM)), max_size=30))
def test_where_the_stream_is_cut_into_segments_makes_no_difference(cuts: list[int]) -> None:
    whole = sse.Events()
    expected = [*whole.feed(STREAM), *whole.end()]
    cut = sse.Events()
    edges = [0, *sorted(cuts), len(STREAM)]
    events = [event for a, b in itertools.pairwise(edges) for event in cut.feed(STREAM[a:b])]
    assert [*events, *cut.end()] == expected
    assert len(expected) == 4
