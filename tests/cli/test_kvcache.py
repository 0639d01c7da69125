"""`lmcache kvcache clear`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from serving import Answer, json_answer, serve

Run = Callable[..., Any]
CLEARED = {"status": "ok", "cleared": {"tier": "l1", "num_entries": 41, "num_kept": 1}}


def test_clear_posts_the_tier_and_says_what_was_dropped(lmcache: Run) -> None:
    with serve({"/cache/clear": json_answer(CLEARED)}) as server:
        ended = lmcache("kvcache", "clear", "--url", server.url)
    assert ended.status == 0
    assert ended.out.splitlines() == [
        "================ KV Cache Clear ================",
        "Status:                                       OK",
        "Entries dropped:                              41",
        "Entries kept (in use):                         1",
        "================================================",
    ]
    (asked,) = server.asked
    assert (asked.method, json.loads(asked.body)["tier"]) == ("POST", "l1")


def test_clear_in_json(lmcache: Run) -> None:
    with serve({"/cache/clear": json_answer(CLEARED)}) as server:
        ended = lmcache("kvcache", "clear", "--url", server.url, "--format", "json")
    assert json.loads(ended.out) == {
        "title": "KV Cache Clear",
        "metrics": {"status": "OK", "entries_dropped": 41, "entries_kept": 1},
    }


def test_a_server_that_does_not_count_is_enough(lmcache: Run) -> None:
    with serve({"/cache/clear": json_answer({"status": "ok", "cleared": {"tier": "l1"}})}) as server:
        ended = lmcache("kvcache", "clear", "--url", server.url, "--format", "json")
    assert (ended.status, json.loads(ended.out)["metrics"]) == (
        0,
        {"status": "OK", "entries_dropped": None, "entries_kept": None},
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (json_answer({"hello": 1}), "did not confirm that the cache was cleared"),
        (Answer(body=b"ok"), "is not JSON"),
        (json_answer({"detail": "tier 'l2' not supported"}, 400), "HTTP 400 Bad Request"),
        (json_answer({"detail": [{"loc": ["body"], "msg": "field required"}]}, 422), "field required"),
    ],
)
def test_an_answer_that_confirms_nothing_is_a_failure(lmcache: Run, answer: Answer, said: str) -> None:
    with serve({"/cache/clear": answer}) as server:
        ended = lmcache("kvcache", "clear", "--url", server.url)
    assert (ended.status, ended.out) == (1, "")
    assert said in ended.err
