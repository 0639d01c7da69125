"""`lmcache quota`: four verbs, any salt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from serving import json_answer, serve

from lmcache_cli import api

Run = Callable[..., Any]
TENANT = {"cache_salt": "a", "limit_gb": 2.5, "current_usage_gb": None, "exists": True}


def test_the_list_names_every_tenant(lmcache: Run) -> None:
    users = {"a": {"limit_gb": 2.5, "current_usage_gb": 1.25}, "_default": {"limit_gb": 1, "current_usage_gb": None}}
    with serve({"/quota": json_answer({"users": users})}) as server:
        ended = lmcache("quota", "list", "--url", server.url)
        assert ended.status == 0
        assert [len(line) for line in ended.out.splitlines()] == [55] * len(ended.out.splitlines())
        assert "Limit (GB):                                        2.50" in ended.out
        assert "Current usage (GB):                                 N/A" in ended.out
        document = json.loads(lmcache("quota", "list", "--url", server.url, "--format", "json").out)
    assert document["metrics"] == {
        "num_quotas": 2,
        "quotas": [
            {"cache_salt": "a", "limit_gb": 2.5, "current_usage_gb": 1.25},
            {"cache_salt": "_default", "limit_gb": 1.0, "current_usage_gb": None},
        ],
    }


def test_an_empty_list_is_a_list(lmcache: Run) -> None:
    with serve({"/quota": json_answer({"users": {}})}) as server:
        ended = lmcache("quota", "list", "--url", server.url, "--format", "json")
        table = lmcache("quota", "list", "--url", server.url).out
    assert json.loads(ended.out)["metrics"] == {"num_quotas": 0, "quotas": []}
    assert table.splitlines()[1].split() == ["Quotas:", "0"]


@pytest.mark.parametrize("salt", ["a", "a?b", "a/b", "a b", "a#b", "..", "ü", "_default", "", "-x", "a%2Fb"])
@pytest.mark.parametrize(
    ("verb", "method", "answer"),
    [
        (("get",), "GET", TENANT),
        (("set", "--limit-gb", "2.5"), "PUT", {"cache_salt": "a", "limit_gb": 2.5, "status": "ok"}),
        (("delete",), "DELETE", {"cache_salt": "a", "status": "removed"}),
    ],
)
def test_a_salt_reaches_the_server_as_one_segment(
    lmcache: Run, salt: str, verb: tuple[str, ...], method: str, answer: dict[str, Any]
) -> None:
    path = api.quota_path(salt)
    assert path.count("/") == 2
    assert not set(path) & set("?# ")
    with serve({path: json_answer(answer)}) as server:
        ended = lmcache("quota", *verb, "--url", server.url, "--", salt)
    assert (ended.status, ended.err) == (0, "")
    (asked,) = server.asked
    assert (asked.method, asked.path) == (method, path)
    if method == "PUT":
        assert json.loads(asked.body) == {"limit_gb": 2.5}


def test_no_two_salts_share_a_path() -> None:
    salts = ["", "_default", "%5Fdefault", "a/b", "a%2Fb", "a?b", "a", ".", "..", "a b", "a+b"]
    assert len({api.quota_path(salt) for salt in salts}) == len(salts)


def test_deleting_what_has_no_limit_is_no_error(lmcache: Run) -> None:
    with serve({"/quota/a": json_answer({"cache_salt": "a", "status": "not_found"})}) as server:
        ended = lmcache("quota", "delete", "a", "--url", server.url, "--format", "json")
    assert (ended.status, json.loads(ended.out)["metrics"]) == (0, {"cache_salt": "a", "status": "not_found"})


@pytest.mark.parametrize("limit", ["-1", "nan", "inf", "much"])
def test_a_limit_that_is_none_is_not_sent(lmcache: Run, limit: str) -> None:
    with serve({}) as server:
        ended = lmcache("quota", "set", "a", f"--limit-gb={limit}", "--url", server.url)
    assert (ended.status, ended.out, server.asked) == (2, "", [])
    assert ended.err.count("\n") == 1


@pytest.mark.parametrize("verb", [("set", "a", "--limit-gb", "1"), ("delete", "a")])
def test_an_answer_that_confirms_nothing_is_a_failure(lmcache: Run, verb: tuple[str, ...]) -> None:
    with serve({"/quota/a": json_answer({"hello": 1})}) as server:
        ended = lmcache("quota", *verb, "--url", server.url)
    assert ended.status == 1
    assert "did not confirm" in ended.err


def test_the_servers_own_words_are_passed_on(lmcache: Run) -> None:
    with serve({"/quota/a": json_answer({"error": "limit_gb must be finite"}, 400)}) as server:
        ended = lmcache("quota", "set", "a", "--limit-gb", "1", "--url", server.url)
    assert (ended.status, "limit_gb must be finite" in ended.err) == (1, True)


@pytest.mark.parametrize("words", [("get",), ("delete",), ("set", "--limit-gb", "1")])
def test_a_salt_that_is_not_utf8_is_wrong_usage(lmcache: Run, words: tuple[str, ...]) -> None:
    ended = lmcache("quota", *words, "\udcff", "--url", "127.0.0.1:1")
    assert (ended.status, ended.out, "is not UTF-8 text" in ended.err) == (2, "", True)
