"""What the workloads send: shared parts are shared, distinct parts share nothing, sizes are real, seeds decide."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_cli import api
from lmcache_cli.bench import budget, sizing, texts
from lmcache_cli.bench.base import BenchError, Outcome, Request
from lmcache_cli.bench.workloads import WORKLOADS
from lmcache_cli.bench.workloads.common import TOKENS_MAX
from lmcache_cli.client import TokenCount
from lmcache_cli.errors import BadAnswer, HttpFailure, UsageFault

SMALL = {
    "long-doc-qa": {"ldqa_document_length": 120},
    "multi-round-chat": {"mrc_shared_prompt_length": 60, "mrc_chat_history_length": 120, "mrc_user_input_length": 12},
    "long-doc-permutator": {"ldp_num_contexts": 4, "ldp_context_length": 80, "ldp_system_prompt_length": 40},
    "prefix-suffix-tuner": {"psf_context_length": 700},
    "random-prefill": {"rp_request_length": 90, "rp_num_requests": 6},
}
VOLUME = 2000


def tokens_of(text: str) -> int:
    """A tokenizer of the test's own: a word is one to three tokens, the same word always the same."""
    return sum(1 + random.Random(word).randrange(3) for word in text.split())


class Fake:
    """Texts sized by ``tokens_of``."""

    def tokenize(self, model: str, prompt: str) -> TokenCount:  # noqa: ARG002
        return TokenCount(tokens_of(prompt), None, [])

    def chat_usage(self, model: str, content: str, max_tokens: int = 1) -> int | None:  # noqa: ARG002
        return tokens_of(content) + 11


def make(name: str, seed: int = 42, volume: int = VOLUME, **changed: Any) -> Any:
    kind = WORKLOADS[name]
    given_settings = {option.key: option.default for option in kind.options} | SMALL[name] | changed
    workload = kind(given_settings, seed, volume if kind.uses_volume else None)
    workload.prepare(sizing.texts_for(Fake(), "m", seed))
    return workload


def drained(workload: Any, most: int = 40) -> list[Request]:
    source, requests = workload.source(), []
    while not source.is_exhausted and len(requests) < most:
        request = source.take()
        requests.append(request)
        source.done(Outcome(request, 0, 0, 1, text=f"answer {len(requests)}"))
    return requests


def flat(request: Request) -> str:
    return "\n".join(message["content"] for message in request.messages)


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_same_seed_sends_the_same_and_another_sends_another(name: str) -> None:
    first, again, other = (drained(make(name, seed)) for seed in (1, 1, 2))
    assert first == again
    assert not {flat(request) for request in first} & {flat(request) for request in other}


@pytest.mark.parametrize("name", WORKLOADS)
def test_the_plan_says_what_is_sent(name: str) -> None:
    workload = make(name)
    plan, requests, warmup = workload.plan(), drained(workload), workload.warmup()
    assert len(warmup) == plan.num_warmup_requests
    assert len({request.id for request in [*requests, *warmup]}) == len(requests) + len(warmup)
    if plan.num_requests is not None:
        assert len(requests) == plan.num_requests
        total = sum(tokens_of(flat(request)) for request in requests)
        assert total == pytest.approx(plan.prompt_tokens, rel=0.05)
    firsts = [request.group for request in [*warmup, *requests] if request.is_first]
    assert len(firsts) == len(set(firsts))  # one first of each group


def test_documents_share_nothing_and_their_questions_share_the_document() -> None:
    workload = make("long-doc-qa")
    requests = drained(workload)
    assert len(requests) == 2 * (VOLUME // 120)
    by_group = {
        group: [flat(r) for r in members]
        for group, members in itertools.groupby(sorted(requests, key=lambda r: r.group), key=lambda r: r.group)
    }
    for members in by_group.values():
        first, second = (text.split("\n\n")[0] for text in members)
        assert first == second
        assert abs(tokens_of(first) - 120) <= 3
    documents = [members[0].split("\n\n")[0] for members in by_group.values()]
    apart(documents)
    assert {flat(r) for r in workload.warmup()} == set(documents)


def apart(parts: list[str]) -> None:
    """No two of these begin alike or have eight words in a row in common."""
    seen: dict[tuple[str, ...], int] = {}
    for index, part in enumerate(parts):
        words = part.split()
        for start in range(len(words) - 7):
            assert seen.setdefault(tuple(words[start : start + 8]), index) == index
    for one, other in itertools.combinations(parts, 2):
        assert len(common_start(one, other)) < 6


def common_start(one: str, other: str) -> str:
    """The letters with which both texts begin."""
    num = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:num]


@pytest.mark.parametrize("policy", ["tile", "random"])
def test_the_order_of_questions_is_the_policys(policy: str) -> None:
    ids = [request.id for request in drained(make("long-doc-qa", ldqa_shuffle_policy=policy))]
    num = VOLUME // 120
    tiled = [f"doc{document}_q{question}" for question in range(2) for document in range(num)]
    assert (ids == tiled) == (policy == "tile")
    assert sorted(ids) == sorted(tiled)


def test_a_chat_keeps_the_engines_answers_and_shares_its_system_prompt() -> None:
    workload = make("multi-round-chat")
    requests = drained(workload, most=3 * workload.plan().documents[0][1])
    systems = {request.messages[0]["content"] for request in requests}
    assert len(systems) == 1
    assert abs(tokens_of(systems.pop()) - 60) <= 3
    rounds = {request.id: request for request in requests}
    later = rounds["s0_r1"].messages
    assert [message["role"] for message in later] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert later[:4] == rounds["s0_r0"].messages
    assert later[4]["content"] == "answer 1"
    apart([request.messages[1]["content"] for request in requests if request.id.endswith("_r0")])


def test_a_failed_turn_leaves_no_trace_in_the_history() -> None:
    from lmcache_cli.bench.base import Failure

    source = make("multi-round-chat", volume=1).source()
    first = source.take()
    assert source.take() is None  # its only session waits
    source.done(Outcome(first, 0, 0, 1, text="half an ans", failure=Failure("cut_short", "it broke")))
    second = source.take()
    assert [m["role"] for m in second.messages] == [m["role"] for m in first.messages]
    assert not any(message["content"] == "" for message in second.messages)


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 60))
@settings(max_examples=30)
def test_orders_are_distinct_and_favour_no_context(seed: int, num_contexts: int, wanted: int) -> None:
    changed = {"ldp_num_contexts": num_contexts, "ldp_num_permutations": wanted, "ldp_context_length": 3}
    requests = drained(make("long-doc-permutator", seed, ldp_system_prompt_length=0, **changed), most=100)
    contents = [flat(request) for request in requests]
    assert len(set(contents)) == len(contents) <= wanted
    assert all(len(content.split("\n\n")) == num_contexts for content in contents)
    if num_contexts >= 4 and wanted >= 20:
        assert len({content.split("\n\n")[0] for content in contents}) > 1


def test_both_passes_share_the_prefix_and_the_suffix_and_not_the_breaker() -> None:
    workload = make("prefix-suffix-tuner", volume=2000)
    first, second = workload.warmup(), drained(workload)
    assert len(first) == len(second) == 2100 // 700
    for one, other in zip(first, second, strict=True):
        shared = common_start(flat(one), flat(other))
        assert abs(tokens_of(shared) - 560) <= 6
        assert flat(one) != flat(other)
    tails = {" ".join(flat(request).split()[-40:]) for request in [*first, *second]}
    assert len(tails) == 1
    apart([flat(request)[:400] for request in second])
    assert workload.pause_s == 5.0


def test_random_prompts_share_nothing() -> None:
    requests = drained(make("random-prefill"))
    apart([flat(request) for request in requests])
    assert {request.output_tokens_max for request in requests} == {1}


@pytest.mark.parametrize(
    ("name", "volume", "changed"),
    [
        ("prefix-suffix-tuner", 2000, {"psf_prefix_ratio": 0.99}),
        ("long-doc-qa", TOKENS_MAX + 120, {}),
        ("long-doc-qa", 655_300, {"ldqa_query_per_document": 10_000, "ldqa_document_length": 10_000}),
        ("long-doc-permutator", None, {"ldp_context_length": 10_000_000, "ldp_num_contexts": 1000}),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_sentence(name: str, volume: int, changed: dict[str, Any]) -> None:
    with pytest.raises(UsageFault, match="--") as refused:
        make(name, volume=volume, **changed)
    assert "\n" not in str(refused.value)


# --- sizes


@given(st.integers(1, 3000), st.integers(0, 99))
@settings(max_examples=40)
def test_texts_have_their_size_in_the_engines_tokens(num_tokens: int, seed: int) -> None:
    made = sizing.texts_for(Fake(), "m", seed)
    assert made.method == "tokenize"
    text = made.words(num_tokens, "x", seed)
    assert abs(tokens_of(text) - num_tokens) <= max(3, num_tokens // 100)
    assert text == sizing.texts_for(Fake(), "m", seed).words(num_tokens, "x", seed)


@pytest.mark.parametrize("failure", [HttpFailure(404, "no such path"), HttpFailure(405, "no"), BadAnswer("not JSON")])
def test_without_a_tokenizer_sizes_are_learnt_from_usage(failure: Exception) -> None:
    class Without(Fake):
        def tokenize(self, model: str, prompt: str) -> TokenCount:  # noqa: ARG002
            raise failure

    made = sizing.texts_for(Without(), "m", 1)
    assert made.method == "calibrated"
    for num_tokens in (100, 1000, 5000):
        assert tokens_of(made.words(num_tokens, "x")) == pytest.approx(num_tokens, rel=0.1)


@pytest.mark.parametrize("usage", [lambda: None, lambda: 7])
def test_an_engine_that_counts_nothing_cannot_be_measured(usage: Callable[[], int | None]) -> None:
    class Silent:
        def tokenize(self, model: str, prompt: str) -> TokenCount:  # noqa: ARG002
            raise HttpFailure(404, "no such path")

        def chat_usage(self, model: str, content: str, max_tokens: int = 1) -> int | None:  # noqa: ARG002
            return usage()

    with pytest.raises(BenchError, match="cannot be sized"):
        sizing.texts_for(Silent(), "m", 1)


def test_a_refused_key_is_not_taken_for_a_missing_tokenizer() -> None:
    class Refusing(Fake):
        def tokenize(self, model: str, prompt: str) -> TokenCount:  # noqa: ARG002
            raise HttpFailure(401, "HTTP 401 Unauthorized")

    with pytest.raises(HttpFailure):
        sizing.texts_for(Refusing(), "m", 1)


def test_the_word_list_is_plain_and_large_enough() -> None:
    words = texts.word_list()
    assert len(words) == len(set(words)) > 1000
    assert all(word.isascii() and word.isalpha() and word.islower() for word in words)


def status(*engines: tuple[str, int | None, int]) -> api.Status:
    meta = {
        str(index): {
            "model_name": model,
            "world_size": world,
            "kv_cache_layout": {"cache_size_per_token": size} if size else {},
        }
        for index, (model, size, world) in enumerate(engines)
    }
    return api.from_json(api.Status, {"cache_context_meta": meta})


def test_tokens_per_gb_follow_from_what_is_registered() -> None:
    assert budget.tokens_per_gb(status(("x", 1, 1), ("m", 81920, 2)), "m") == 6553  # the reference's example
    assert budget.volume_tokens(100.0, 6553) == 655300


@pytest.mark.parametrize(
    ("known", "said"),
    [((), "no engine registered"), ((("x", 8, 1),), "only x"), ((("m", None, 1),), "does not say how big")],
)
def test_where_they_cannot_be_known_the_flag_is_named(known: Any, said: str) -> None:
    with pytest.raises(BenchError, match=said) as refused:
        budget.tokens_per_gb(status(*known), "m")
    assert "--tokens-per-gb-kvcache" in str(refused.value)


def test_an_answer_that_was_all_reasoning_leaves_no_empty_message() -> None:
    source = make("multi-round-chat", volume=1).source()
    source.done(Outcome(source.take(), 0, 0, 1, text=""))
    assert not any(message["content"] == "" for message in source.take().messages)
