"""`lmcache audit isolation` against a server and an engine that keep tenants apart, or do not; and its statistics."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keeping_engine import CHUNK, Habits, Keeping, keeping
from test_schemas import check, check_strictly

from lmcache_cli.audit.statistics import separation
from lmcache_cli.audit.tenants import similar_salts

Run = Callable[..., Any]
NAMES = ("same_salt_hits", "other_salt_misses", "other_salt_cannot_evict", "timing_not_separable")
SLOW_S = 0.002
"""Seconds that a computed token takes where times are looked at."""


def audit(lmcache: Run, state: Keeping, *words: str) -> tuple[int, Any]:
    where = ("--engine-url", state.engine_url, "--lmcache-url", state.server_url, "--samples", "20")
    ended = lmcache("audit", "isolation", *where, "--format", "json", *words)
    assert (ended.err == "") == (ended.status == 0)
    return ended.status, check_strictly("audit_isolation", ended.out)


def results(document: Any) -> tuple[str, ...]:
    checks = document["metrics"]["checks"]
    assert tuple(each["name"] for each in checks) == NAMES
    return tuple(each["result"] for each in checks)


def detail(document: Any, name: str) -> str:
    return next(each["detail"] for each in document["metrics"]["checks"] if each["name"] == name)


def test_tenants_that_are_kept_apart_pass(lmcache: Run) -> None:
    with keeping(Habits(prefill_s=SLOW_S)) as state:
        status, document = audit(lmcache, state)
    assert (status, results(document)) == (0, ("pass",) * 4)
    figures = document["metrics"]["checks"][3]["figures"]
    assert figures["control_p_value"] < 0.001
    assert figures["control_auc"] < 0.1
    assert figures["own_median_ms"] < figures["unseen_median_ms"]


def test_the_limit_of_the_flooding_tenant_is_removed_again(lmcache: Run) -> None:
    with keeping() as state:
        audit(lmcache, state)
    assert state.limits == {}
    asked = [method for method, path, _, _ in state.asked_server if path.startswith("/quota/")]
    assert (asked.count("PUT"), asked.count("DELETE"), asked[-1]) == (1, 1, "DELETE")


def test_times_that_betray_another_tenant_fail_although_nothing_else_does(lmcache: Run) -> None:
    with keeping(Habits(prefill_s=SLOW_S, is_felt=True)) as state:
        status, document = audit(lmcache, state)
    assert (status, document["error"]["code"]) == (1, "not_isolated")
    assert results(document) == ("pass", "pass", "pass", "fail")
    assert "earlier than unseen ones" in detail(document, NAMES[3])
    figures = document["metrics"]["checks"][3]["figures"]
    assert figures["p_value"] < 0.01
    assert figures["p_value_again"] < 0.01
    assert figures["shift_ms"] < 0


def test_where_a_hit_is_no_faster_the_times_prove_nothing(lmcache: Run) -> None:
    with keeping(Habits(is_random=True)) as state:
        status, document = audit(lmcache, state, "--prompt-tokens", str(CHUNK))
    assert (status, results(document)) == (0, ("pass", "pass", "pass", "inconclusive"))
    assert "use longer prompts or more samples" in detail(document, NAMES[3])


@pytest.mark.parametrize(
    ("habits", "failed", "says"),
    [
        (Habits(ignores_salt=True), {"other_salt_misses", "timing_not_separable"}, "finds"),
        (Habits(looks_alike=True), {"other_salt_misses"}, "look-up with another salt"),
        (Habits(ignores_limits=True), {"other_salt_cannot_evict"}, "times what it may have"),
        (Habits(evicts_others=True), {"other_salt_cannot_evict"}, "of another's chunks"),
    ],
)
def test_each_way_to_fail_is_named(lmcache: Run, habits: Habits, failed: set[str], says: str) -> None:
    with keeping(habits) as state:
        status, document = audit(lmcache, state)
    assert (status, document["error"]["code"]) == (1, "not_isolated")
    assert {name for name, result in zip(NAMES, results(document), strict=True) if result == "fail"} == failed
    assert says in document["error"]["message"]
    assert state.limits == {}


@pytest.mark.parametrize(
    ("habits", "says"),
    [
        (Habits(stores=False), "does not hold 4 of 4 chunks"),
        (Habits(loads=False), "computed again for its own tenant"),
    ],
)
def test_a_cache_that_never_hits_passes_nothing(
    lmcache: Run, monkeypatch: pytest.MonkeyPatch, habits: Habits, says: str
) -> None:
    monkeypatch.setattr("lmcache_cli.verify.evidence.HELD_S", 0.1)
    with keeping(habits) as state:
        status, document = audit(lmcache, state)
    assert (status, document["error"]["code"]) == (1, "not_isolated")
    assert results(document) == ("fail", "not_run", "not_run", "not_run")
    assert says in detail(document, NAMES[0])


def test_without_the_right_to_set_limits_that_check_is_not_run_and_says_why(lmcache: Run) -> None:
    with keeping(Habits(has_quota=False)) as state:
        status, document = audit(lmcache, state)
    assert (status, results(document)[2]) == (0, "not_run")
    assert "this needs the role admin" in detail(document, NAMES[2])


def test_what_was_found_before_the_engine_failed_is_reported_and_the_limit_is_gone(lmcache: Run) -> None:
    with keeping(Habits(fails_after=6)) as state:  # stored, asked again, two others, and two of the flood
        status, document = audit(lmcache, state)
    assert (status, document["error"]["code"], state.limits) == (1, "http_500", {})
    assert results(document) == ("pass", "pass", "not_run", "not_run")


def test_without_an_engine_look_ups_are_all_that_is_done(lmcache: Run, tmp_path: Path) -> None:
    with keeping() as state:
        tokens = list(range(9))
        state.salts.append("tenant")
        state.store(tokens, "tenant")
        words = ("audit", "isolation", "--lmcache-url", state.server_url, "--format", "json")
        ended = lmcache(*words)
        document = check_strictly("audit_isolation", ended.out)
        assert (ended.status, document["error"]["code"]) == (1, "not_audited")
        assert results(document) == ("not_run",) * 4
        (tmp_path / "ids").write_text(" ".join(map(str, tokens)))
        ended = lmcache(*words, "--token-ids", f"@{tmp_path / 'ids'}", "--cache-salt", "tenant")
        document = check_strictly("audit_isolation", ended.out)
        assert (ended.status, results(document)) == (0, ("pass", "pass", "not_run", "not_run"))
        assert "give --engine-url" in detail(document, NAMES[3])
        assert state.asked == []
        ended = lmcache(*words, "--token-ids", "5,6,7,8", "--cache-salt", "tenant")
        assert (ended.status, results(json.loads(ended.out))[0]) == (1, "fail")
        state.store(tokens, "tenant ")
        ended = lmcache(*words, "--token-ids", f"@{tmp_path / 'ids'}", "--cache-salt", "tenant")
        assert (ended.status, results(json.loads(ended.out))[1]) == (1, "fail")


@pytest.mark.parametrize(
    "words",
    [
        ("--samples", "5"),
        ("--prompt-tokens", "0"),
        ("--token-ids", "1"),
        ("--cache-salt", "a"),
        ("--token-ids", "x", "--cache-salt", "a"),
        ("--token-ids", "1", "--cache-salt", "a", "--engine-url", "localhost:1"),
        ("--model", "\udcff"),
    ],
)
def test_wrong_usage_asks_nobody(lmcache: Run, words: tuple[str, ...]) -> None:
    with keeping() as state:
        ended = lmcache("audit", "isolation", "--lmcache-url", state.server_url, "--format", "json", *words)
        assert (ended.status, state.asked, state.asked_server) == (2, [], [])
    assert check("audit_isolation", ended.out)["error"]["code"] == "usage"


def test_keys_go_to_their_own_server_only(lmcache: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_TOKEN", "of-the-server")
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-engine")
    with keeping() as state:
        audit(lmcache, state, "--header", "X-Who=me")
    assert {headers["authorization"] for _, _, headers, _ in state.asked} == {"Bearer of-the-engine"}
    assert {headers["authorization"] for _, _, headers, _ in state.asked_server} == {"Bearer of-the-server"}
    assert {headers.get("x-who") for _, _, headers, _ in state.asked} == {None}


def test_the_terminal_form_has_a_result_for_each_check(lmcache: Run) -> None:
    with keeping(Habits(prefill_s=SLOW_S)) as state:
        where = ("--engine-url", state.engine_url, "--lmcache-url", state.server_url, "--samples", "20")
        ended = lmcache("audit", "isolation", *where)
    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert (ended.status, lines.count("Result: pass")) == (0, 4)
    assert any(line.startswith("Unseen prompt, median (ms):") for line in lines)


def test_salts_that_look_alike_are_never_the_salt_itself() -> None:
    for salt in ("a", "Tenant", "_default", "", " "):
        others = similar_salts(salt)
        assert salt not in others
        assert len(others) == len(set(others)) > 4


# --- statistics


@pytest.mark.parametrize(
    ("first", "second", "auc", "p_value"),
    [
        # by scipy 1.17: mannwhitneyu(a, b, method="asymptotic")
        ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], 0.0, 0.01219),
        ([1, 3, 5, 7, 9], [2, 4, 6, 8, 10], 0.4, 0.6761),
        ([1, 1, 2, 2, 3], [2, 3, 3, 4, 4], 0.12, 0.05241),
        ([5, 5, 5], [5, 5, 5, 5], 0.5, 1.0),
    ],
)
def test_the_p_value_is_what_a_reference_implementation_gives(
    first: list[float], second: list[float], auc: float, p_value: float
) -> None:
    found = separation(first, second)
    assert found.auc == pytest.approx(auc)
    assert found.p_value == pytest.approx(p_value, rel=0.001)
    assert found.auc_low <= found.auc <= found.auc_high


VALUES = st.lists(st.integers(0, 20).map(float), min_size=1, max_size=12)


@given(VALUES, VALUES)
@settings(max_examples=200, deadline=None)
def test_the_area_is_the_share_of_pairs_and_turns_round_with_the_samples(
    first: list[float], second: list[float]
) -> None:
    found, turned = separation(first, second), separation(second, first)
    pairs = [(a > b) + (a == b) / 2 for a in first for b in second]
    assert found.auc == pytest.approx(sum(pairs) / len(pairs))
    assert turned.auc == pytest.approx(1 - found.auc)
    assert turned.p_value == pytest.approx(found.p_value)
    assert turned.shift == pytest.approx(-found.shift)
    assert 0 <= found.p_value <= 1


def test_samples_of_one_distribution_are_rarely_told_apart() -> None:
    numbers = random.Random(1)
    draws = [separation(*[[numbers.expovariate(1) for _ in range(30)] for _ in range(2)]) for _ in range(1000)]
    suspected = sum(each.p_value < 0.01 for each in draws)
    assert 1 <= suspected <= 25
    covered = sum(each.auc_low <= 0.5 <= each.auc_high for each in draws)
    assert covered >= 900
