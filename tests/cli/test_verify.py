"""`lmcache verify engine` against an engine that keeps or breaks its promises, over real sockets."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keeping_engine import CHUNK, MODEL, Habits, Keeping, keeping
from serving import Answer as Served
from serving import json_answer, serve
from test_schemas import check, check_strictly

from lmcache_cli.verify.compare import CLOSE, DIFFERENT, EQUAL, compare, first_difference
from lmcache_cli.verify.evidence import Counters, judge
from lmcache_cli.verify.greedy import Answer

Run = Callable[..., Any]


def verify(lmcache: Run, state: Keeping, *words: str) -> tuple[int, Any]:
    where = ("--engine-url", state.engine_url, "--lmcache-url", state.server_url)
    ended = lmcache("verify", "engine", *where, "--max-tokens", "4", "--format", "json", *words)
    document = check_strictly("verify_engine", ended.out)
    assert (ended.err == "") == (ended.status == 0)
    return ended.status, document


def verdicts(document: Any) -> set[str]:
    return {row["verdict"] for row in document["metrics"]["prompts"]}


# --- what is found


def test_a_cache_that_keeps_its_promise_is_equal(lmcache: Run) -> None:
    with keeping() as state:
        status, document = verify(lmcache, state)
    metrics = document["metrics"]
    assert (status, metrics["status"], metrics["model"], metrics["chunk_size"]) == (0, "OK", MODEL, CHUNK)
    assert (metrics["num_prompts"], metrics["num_equal"], metrics["divergence_rate"]) == (5, 5, 0.0)
    assert [row["prompt_tokens"] for row in metrics["prompts"]] == [4, 8, 13, 20, 32]
    for row in metrics["prompts"]:
        assert (row["source"], row["told_by"], row["is_deterministic"]) == ("lmcache", "engine metrics", True)
        assert row["lmcache_tokens"] == row["cached_tokens"] > 0


def test_every_request_is_greedy_and_only_the_two_of_a_pair_share_a_salt(lmcache: Run) -> None:
    with keeping() as state:
        verify(lmcache, state)
        prompts = state.prompts
    assert all((body["temperature"], body["max_tokens"], body["ignore_eos"]) == (0, 4, True) for body in prompts)
    salts = [body["cache_salt"] for body in prompts]
    assert len(salts) == 5 * 4
    assert [salts.count(salt) for salt in dict.fromkeys(salts)] == [1, 1, 2] * 5


@pytest.mark.parametrize(("bad", "has_logprobs"), [(0, True), (1, False), (4, True), (6, True), (7, False)])
def test_the_first_chunk_that_lies_is_found_with_its_tier(lmcache: Run, bad: int, has_logprobs: bool) -> None:
    habits = Habits(bad_chunk=bad, tiers=("l1", "l1", "l1", "disk", "disk", "far"), has_logprobs=has_logprobs)
    with keeping(habits) as state:
        status, document = verify(lmcache, state)
    metrics = document["metrics"]
    num_bad = sum(chunks > bad for chunks in (1, 2, 3, 5, 8))
    assert (status, document["error"]["code"]) == (1, "diverged")
    assert (metrics["num_diverged"], metrics["divergence_rate"]) == (num_bad, num_bad / 5)
    tier = ("l1", "l1", "l1", "disk", "disk", "far", "far", "far")[bad]
    assert f"chunk {bad} ({tier})" in document["error"]["message"]
    for row in metrics["prompts"]:
        if row["prompt_tokens"] // CHUNK > bad:
            found = (row["verdict"], row["first_bad_chunk"], row["first_bad_tier"], row["is_stored_again_bad"])
            assert found == ("diverged", bad, tier, True)
            assert (row["difference"]["position"] == 0) == has_logprobs  # of letters, where there are no tokens
            assert row["difference"]["expected"] != row["difference"]["got"]
        else:
            assert (row["verdict"], row["first_bad_chunk"], row["narrowing_requests"]) == ("equal", None, None)


def test_one_damaged_copy_is_told_from_a_path_that_always_lies(lmcache: Run, tmp_path: Path) -> None:
    (tmp_path / "long").write_text(" ".join(f"word{n}" for n in range(70)))
    with keeping(Habits(bad_chunk=9, bad_salt=2)) as state:  # computed, computed, stored: the third salt
        _, document = verify(lmcache, state, "--prompt", f"@{tmp_path / 'long'}")
    (row,) = document["metrics"]["prompts"]
    assert (row["first_bad_chunk"], row["is_stored_again_bad"]) == (9, False)


def test_log_probabilities_that_move_are_a_divergence_although_the_tokens_agree(lmcache: Run) -> None:
    with keeping(Habits(shifts_logprobs=0.3)) as state:
        status, document = verify(lmcache, state)
        assert (status, verdicts(document)) == (1, {"diverged"})
        assert document["metrics"]["logprob_difference_max"] == pytest.approx(0.3)
        assert document["metrics"]["prompts"][0]["difference"]["position"] is None
        status, document = verify(lmcache, state, "--logprob-tolerance", "0.5")
        assert (status, verdicts(document)) == (0, {"equal"})


@pytest.mark.parametrize(("ties", "status", "verdict"), [("tie", 0, "close"), ("clear", 1, "diverged")])
def test_the_other_side_of_a_tie_is_no_divergence(lmcache: Run, ties: str, status: int, verdict: str) -> None:
    with keeping(Habits(ties=ties)) as state:
        ended, document = verify(lmcache, state)
    assert (ended, verdicts(document)) == (status, {verdict})
    row = document["metrics"]["prompts"][0]["difference"]
    assert (row["position"], row["expected"], row["got"]) == (1, "token_id:a", "token_id:b")


# --- what must not be called equal


@pytest.mark.parametrize(
    ("habits", "verdict", "reason"),
    [
        (Habits(stores=False), "not_cached", "holds none of its chunks"),
        (Habits(loads=False), "not_cached", "computed it although the server holds"),
        (Habits(loads=False, has_usage=False), "not_cached", "computed it although the server holds"),
        (Habits(quarantines=True), "not_cached", "a chunk failed the check at use"),
        (Habits(has_own_cache=True), "not_cached", "own prefix cache served it"),
        (Habits(has_own_cache=True, has_usage=False), "not_cached", "own prefix cache served it"),
        (Habits(others_ask=True), "not_cached", "other requests ran at the same time"),
        (Habits(is_random=True), "inconclusive", "not deterministic"),
        (Habits(drift=1.0), "inconclusive", "not deterministic"),
        (Habits(ignores_salt=True), "inconclusive", "a new cache_salt from a cache"),
        (Habits(ignores_salt=True, has_usage=False), "inconclusive", "a new cache_salt from a cache"),
    ],
)
def test_what_the_server_did_not_serve_is_never_called_equal(
    lmcache: Run, monkeypatch: pytest.MonkeyPatch, habits: Habits, verdict: str, reason: str
) -> None:
    monkeypatch.setattr("lmcache_cli.verify.evidence.HELD_S", 0.1)
    monkeypatch.setattr("lmcache_cli.verify.evidence.METRICS_S", 0.1)
    with keeping(habits) as state:
        status, document = verify(lmcache, state, "--prompt", "a b c d e f g h i j")
    assert (status, document["error"]["code"], verdicts(document)) == (1, "not_compared", {verdict})
    assert reason in document["metrics"]["prompts"][0]["reason"]
    assert reason in document["error"]["message"]
    assert (document["metrics"]["num_compared"], document["metrics"]["divergence_rate"]) == (0, None)


def test_an_engine_with_a_cache_of_its_own_is_compared_once_that_is_reset(lmcache: Run) -> None:
    with keeping(Habits(has_own_cache=True, can_reset=True)) as state:
        status, document = verify(lmcache, state, "--reset-prefix-cache")
        assert (status, verdicts(document)) == (0, {"equal"})
        assert {row["source"] for row in document["metrics"]["prompts"]} == {"lmcache"}
    with keeping(Habits(has_own_cache=True)) as state:
        status, document = verify(lmcache, state, "--reset-prefix-cache")
    assert (status, document["error"]["code"]) == (1, "wrong_service")
    assert "VLLM_SERVER_DEV_MODE=1" in document["error"]["message"]


def test_a_prompt_that_both_caches_served_says_how_much_was_ours(lmcache: Run) -> None:
    with keeping(Habits(has_own_cache=True, own_tokens=4)) as state:
        status, document = verify(lmcache, state, "--prompt", "a b c d e f g h i j")
    (row,) = document["metrics"]["prompts"]
    assert (status, row["source"], row["cached_tokens"], row["lmcache_tokens"]) == (0, "both", 8, 4)


def test_an_engine_without_metrics_and_logprobs_is_compared_by_its_usage_and_its_text(lmcache: Run) -> None:
    with keeping(Habits(has_metrics=False, has_logprobs=False)) as state:
        status, document = verify(lmcache, state)
    row = document["metrics"]["prompts"][0]
    assert (status, row["told_by"], row["logprob_difference"]) == (0, "server counters", None)
    assert "logprobs" not in state.prompts[-1]


# --- how it is asked


def test_prompts_of_the_user_are_tokenised_as_a_completion_would_be(lmcache: Run, tmp_path: Path) -> None:
    (tmp_path / "p").write_text("one two three four five")
    with keeping() as state:
        words = ("--prompt", f"@{tmp_path / 'p'}", "--prompt", "too short", "--documents", "d=nowhere")
        assert verify(lmcache, state, *words)[1]["error"]["code"] == "usage"
        status, document = verify(lmcache, state, *words[:4])
    assert (status, [row["verdict"] for row in document["metrics"]["prompts"]]) == (0, ["equal", "not_cached"])
    assert "shorter than a chunk" in document["metrics"]["prompts"][1]["reason"]
    tokenised = [body for _, path, _, body in state.asked if path == "/tokenize"]
    assert [body["add_special_tokens"] for body in tokenised] == [True, True]


def test_keys_go_to_their_own_server_only(lmcache: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TOKEN", "of-the-server")
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-engine")
    with keeping() as state:
        assert verify(lmcache, state, "--header", "X-Who=me")[0] == 0
    assert {headers["authorization"] for _, _, headers, _ in state.asked} == {"Bearer of-the-engine"}
    assert {headers["authorization"] for _, _, headers, _ in state.asked_server} == {"Bearer of-the-server"}
    assert {headers.get("x-who") for _, _, headers, _ in state.asked} == {"me"}
    assert {headers.get("x-who") for _, _, headers, _ in state.asked_server} == {None}


def test_prompts_that_the_model_cannot_take_are_left_out(lmcache: Run) -> None:
    with keeping(Habits(max_model_len=20)) as state:
        assert [row["prompt_tokens"] for row in verify(lmcache, state)[1]["metrics"]["prompts"]] == [4, 8, 13]
    with keeping(Habits(max_model_len=7)) as state:
        status, document = verify(lmcache, state)
    assert (status, "too few for a chunk of 4" in document["error"]["message"]) == (1, True)


def test_what_was_found_before_the_engine_failed_is_reported(lmcache: Run) -> None:
    with keeping(Habits(fails_after=6)) as state:
        status, document = verify(lmcache, state)
    assert (status, document["error"]["code"], document["metrics"]["status"]) == (1, "http_500", "FAIL")
    assert (len(document["metrics"]["prompts"]), document["metrics"]["num_prompts"]) == (1, 5)


def test_the_terminal_form_names_chunk_and_tier(lmcache: Run) -> None:
    with keeping(Habits(bad_chunk=2, tiers=("l1", "l1", "disk"))) as state:
        where = ("--engine-url", state.engine_url, "--lmcache-url", state.server_url)
        ended = lmcache("verify", "engine", *where, "--max-tokens", "4")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "Divergence rate: 60.0%" in lines
    assert "First chunk that changes it: 2" in lines
    assert "Tier of that chunk: disk" in lines
    assert "Chunks held: 2 in l1, 1 in disk" in lines or "Chunks held: 1 in disk, 2 in l1" in lines


@pytest.mark.parametrize(
    "words",
    [
        ("--engine-url", "ftp://x"),
        ("--max-tokens", "0"),
        ("--logprob-tolerance", "nan"),
        ("--logprob-tolerance", "-1"),
        ("--prompt", "\udcff"),
        ("--prompt", "{unknown}"),
        ("--prompt", "@/nowhere"),
        ("--model", "\udcff"),
        ("--documents", "a=b"),
    ],
)
def test_wrong_usage_asks_nobody(lmcache: Run, words: tuple[str, ...]) -> None:
    with keeping() as state:
        where = ("--engine-url", state.engine_url, "--lmcache-url", state.server_url)
        ended = lmcache("verify", "engine", *where, "--format", "json", *words)
        assert (ended.status, state.asked, state.asked_server) == (2, [], [])
    assert check("verify_engine", ended.out)["error"]["code"] == "usage"


@pytest.mark.parametrize("side", ["--engine-url", "--lmcache-url"])
def test_a_side_that_is_not_there_is_a_failure_of_one_line(lmcache: Run, side: str) -> None:
    with keeping() as state:
        where = {"--engine-url": state.engine_url, "--lmcache-url": state.server_url, side: "127.0.0.1:1"}
        words = [word for pair in where.items() for word in pair]
        ended = lmcache("verify", "engine", *words, "--format", "json")
    assert (ended.status, ended.err.count("\n")) == (1, 1)
    assert check_strictly("verify_engine", ended.out)["error"]["code"] == "unreachable"


@pytest.mark.parametrize(
    ("completion", "code"),
    [
        ({}, "bad_answer"),
        ({"choices": []}, "bad_answer"),
        ({"choices": [{"text": None}]}, "bad_answer"),
        ({"choices": ["a"]}, "bad_answer"),
        ({"choices": [{"text": "a", "logprobs": {"tokens": [1]}}], "usage": "many"}, "not_compared"),
        ({"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "top_logprobs": [None]}}]}, "not_compared"),
        ({"choices": [{"text": "a", "logprobs": {"tokens": ["a"], "top_logprobs": [{"a": "x"}]}}]}, "not_compared"),
    ],
)
def test_an_engine_that_answers_nonsense_is_no_proof(
    lmcache: Run, monkeypatch: pytest.MonkeyPatch, completion: Any, code: str
) -> None:
    monkeypatch.setattr("lmcache_cli.verify.evidence.HELD_S", 0.1)
    chunk = {"index": 0, "first_token": 0, "num_tokens": 2, "tier": "l1"}
    models = [{"model_name": "m", "chunks": [chunk] * 9}, {"model_name": "n"}]  # more chunks than were asked about
    engine_answers = {
        "/v1/models": json_answer({"data": [{"id": "m"}]}),
        "/tokenize": json_answer({"tokens": [1, 2, 3, 4, 5]}),
        "/v1/completions": json_answer(completion),
    }
    server_answers = {"/cache/lookup": json_answer({"chunk_size": 2, "models": models}), "/metrics": Served()}
    with serve(engine_answers) as engine, serve(server_answers) as server:
        where = ("--engine-url", engine.url, "--lmcache-url", server.url, "--prompt", "x", "--format", "json")
        ended = lmcache("verify", "engine", *where)
        assert (ended.status, check("verify_engine", ended.out)["error"]["code"]) == (1, code)
        server.answers["/cache/lookup"] = json_answer({"models": []})
        ended = lmcache("verify", "engine", *where)
    assert (ended.status, check("verify_engine", ended.out)["error"]["code"]) == (1, "bad_answer")


# --- comparing


def answer(names: str, *top: dict[str, float], cached: int | None = None) -> Answer:
    return Answer(names, tuple(names), top or None, 8, cached, 0.1)


def test_a_difference_of_length_is_a_difference() -> None:
    found = compare(answer("abc"), answer("ab"), 0.1)
    assert (found.kind, found.position, found.expected, found.got) == (DIFFERENT, 2, "c", "")


def test_a_tie_in_one_answer_alone_is_no_tie() -> None:
    tied, sure = {"a": -1.0, "b": -1.05}, {"b": -1.0, "a": -4.0}
    same = {"x": -0.5}
    assert compare(answer("xa", same, tied), answer("xb", same, tied), 0.1).kind == CLOSE
    assert compare(answer("xa", same, tied), answer("xb", same, sure), 0.1).kind == DIFFERENT
    assert compare(answer("xa", same, {"a": -1.0}), answer("xb", same, tied), 0.1).kind == DIFFERENT


def test_a_token_that_one_side_does_not_list_counts_from_the_least_likely_that_is_listed() -> None:
    assert first_difference(answer("a", {"a": -1.0, "b": -2.0}), answer("a", {"a": -1.0, "c": -2.0})) == 0.0
    assert first_difference(answer("a", {"a": -1.0, "b": -1.5}), answer("a", {"a": -1.0, "c": -3.0})) == 1.5
    assert first_difference(answer("a", {"a": -1.0}), answer("a")) is None


LOGPROBS = st.dictionaries(st.sampled_from("abcd"), st.floats(-20, 0), min_size=1)


@given(LOGPROBS, LOGPROBS, st.floats(0, 5))
@settings(max_examples=200, deadline=None)
def test_the_first_difference_is_the_same_from_both_sides_and_decides_alone(
    one: dict[str, float], two: dict[str, float], tolerance: float
) -> None:
    a, b = answer("x", one), answer("x", two)
    difference = first_difference(a, b)
    assert difference is not None
    assert difference == first_difference(b, a) >= 0
    assert math.isfinite(difference)
    assert compare(a, b, tolerance).kind == (EQUAL if difference <= tolerance else DIFFERENT)


# --- who served it


def counters(external: float | None, own: float | None, lookups: float = 1, hits: float = 8) -> Counters:
    return Counters(own, external, lookups, hits, hits / 8, 0)


@pytest.mark.parametrize(
    ("cached", "after", "source", "ours"),
    [
        (0, counters(8, 0), "none", 0),
        (8, counters(8, 0), "lmcache", 8),
        (8, counters(0, 8), "engine", 0),
        (8, counters(4, 4), "both", 4),
        (8, counters(4, 4, lookups=2), "unclear", None),
        (8, counters(99, 0, lookups=9), "lmcache", 8),  # nobody at all was served by the engine's own cache
        (None, counters(8, 0), "lmcache", 8),
        (None, counters(8, 0, lookups=2), "unclear", None),
        (None, counters(0, 0), "none", 0),
        (8, counters(None, None), "lmcache", 8),
        (None, counters(None, None), "lmcache", None),
        (None, counters(None, None, lookups=2), "unclear", None),
        (8, counters(None, None, hits=0), "engine", 0),
        (None, counters(None, None, hits=0), "none", 0),
    ],
)
def test_who_served_a_prompt(cached: int | None, after: Counters, source: str, ours: int | None) -> None:
    is_counted = after.external_hits is not None
    before = Counters(0.0 if is_counted else None, 0.0 if is_counted else None, 0, 0, 0, 0)
    found = judge(before, after, answer("a", cached=cached))
    assert found.source == source
    if source != "unclear":
        assert found.lmcache_tokens == ours
