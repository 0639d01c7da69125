"""Log probabilities: what the model says, the same for equal requests, streamed or not; compared by `verify engine`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from engine_running import Engine
from hypothesis import given, settings
from hypothesis import strategies as st
from server_running import Server

from lmcache.engine import models
from lmcache.engine.logprobs import FLOOR, completion_block, name, score

HANG_S = 120
WORDS = "the quick brown fox jumps over the lazy dog " * 20
PATHS = {"completion": "/v1/completions", "chat": "/v1/chat/completions"}


@pytest.fixture(scope="module")
def engine(shared: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose KV is kept."""
    with Engine(tmp_path_factory.mktemp("engine"), shared.rpc) as made:
        yield made


def asked(kind: str, text: str, num_top: int, **fields: Any) -> dict[str, Any]:
    """The body of a greedy request that asks for so many likeliest tokens."""
    common = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, **fields}
    if kind == "chat":
        return {"messages": [{"role": "user", "content": text}], "logprobs": True, "top_logprobs": num_top, **common}
    return {"prompt": text, "logprobs": num_top, **common}


def answered(engine: Engine, kind: str, body: dict[str, Any]) -> Any:
    """The one choice of an answer that must succeed."""
    status, document = engine.call("POST", PATHS[kind], body)
    assert status == 200, document
    return document["choices"][0]


def test_they_are_those_of_the_model(engine: Engine) -> None:
    prompt = WORDS[:44]
    block = answered(engine, "completion", asked("completion", prompt, 5, max_tokens=4))["logprobs"]
    model = models.builtin().model
    tokens = list(prompt.encode())
    for position, written in enumerate(block["tokens"]):
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens]), logits_to_keep=1).logits[0, -1]
        logprobs = torch.log_softmax(logits, -1)
        token = int(logprobs.argmax())
        assert written == chr(token)
        likeliest = {chr(int(i)): float(logprobs[i]) for i in logprobs.argsort(descending=True)[:5]}
        assert block["top_logprobs"][position] == pytest.approx(likeliest, abs=0.01)
        assert block["token_logprobs"][position] == block["top_logprobs"][position][written]
        tokens.append(token)


@pytest.mark.parametrize("kind", PATHS)
def test_equal_requests_have_equal_ones_to_the_last_bit(engine: Engine, kind: str) -> None:
    def twice(**fields: Any) -> list[Any]:
        return [answered(engine, kind, asked(kind, f"bits {WORDS}", 5, **fields))["logprobs"] for _ in range(2)]

    computed = [
        answered(engine, kind, asked(kind, f"bits {WORDS}", 5, cache_salt=salt))["logprobs"] for salt in ("a", "b")
    ]
    assert computed[0] == computed[1]
    twice()  # the first of these computed, and stored
    reused = twice()
    assert reused[0] == reused[1]


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("stop", [None, " never said "])
def test_a_stream_tells_the_same(engine: Engine, kind: str, stop: str | None) -> None:
    body = asked(kind, "stream", 3, cache_salt="one chunk is not filled", **({"stop": stop} if stop else {}))
    whole = answered(engine, kind, body)["logprobs"]
    pieces = [event["choices"][0]["logprobs"] for event in engine.stream(PATHS[kind], body) if event["choices"]]
    told = [piece for piece in pieces if piece is not None]
    for name_ in ("content",) if kind == "chat" else ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [entry for piece in told for entry in piece[name_]] == whole[name_]


def test_a_stop_string_that_is_held_back_loses_no_token(engine: Engine) -> None:
    body = asked("completion", "stop", 1, max_tokens=20)
    text = answered(engine, "completion", body)["text"]
    body["stop"] = text[8:12]
    whole = answered(engine, "completion", body)
    assert whole["finish_reason"] == "stop"
    assert "".join(whole["logprobs"]["tokens"]) == whole["text"] + body["stop"]
    events = [event["choices"][0] for event in engine.stream("/v1/completions", body) if event["choices"]]
    streamed = [token for event in events if event["logprobs"] for token in event["logprobs"]["tokens"]]
    assert streamed == whole["logprobs"]["tokens"]


def test_chat_lists_the_likeliest_first_with_their_bytes(engine: Engine) -> None:
    choice = answered(engine, "chat", asked("chat", "hi", 20))
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        likely = entry["top_logprobs"]
        assert len(likely) == 20
        assert [each["logprob"] for each in likely] == sorted((each["logprob"] for each in likely), reverse=True)
        assert (likely[0]["token"], likely[0]["bytes"]) == (entry["token"], list(entry["token"].encode()))


def test_offsets_say_where_each_token_begins(engine: Engine) -> None:
    choice = answered(engine, "completion", asked("completion", "offsets", 0))
    block = choice["logprobs"]
    assert block["text_offset"] == list(range(12))
    assert all(choice["text"].startswith(*each) for each in zip(block["tokens"], block["text_offset"], strict=True))
    assert [len(top) for top in block["top_logprobs"]] == [1] * 12


def test_they_are_told_only_where_asked_for(engine: Engine) -> None:
    for body in ({"logprobs": None}, {"logprobs": False}, {}):
        assert answered(engine, "completion", {"prompt": "a", "max_tokens": 1, **body})["logprobs"] is None
    messages = [{"role": "user", "content": "hi"}]
    for body in ({}, {"logprobs": False, "top_logprobs": 0}):
        assert answered(engine, "chat", {"messages": messages, "max_tokens": 1, **body})["logprobs"] is None


def test_tokens_are_named_by_id_on_request(engine: Engine) -> None:
    body = asked("completion", "ids", 5, return_tokens_as_token_ids=True)
    choice = answered(engine, "completion", body)
    assert choice["logprobs"]["tokens"] == [f"token_id:{ord(letter)}" for letter in choice["text"]]
    assert all(len(top) == 5 for top in choice["logprobs"]["top_logprobs"])


def test_sampled_tokens_are_told_of_too(engine: Engine) -> None:
    block = answered(engine, "completion", {**asked("completion", "any", 1), "temperature": 3.0, "seed": 4})["logprobs"]
    assert any(len(top) == 2 for top in block["top_logprobs"])  # one that was not the likeliest
    for token, logprob, top in zip(block["tokens"], block["token_logprobs"], block["top_logprobs"], strict=True):
        assert top[token] == logprob <= max(top.values())


def test_verify_engine_compares_them(engine: Engine, shared: Server) -> None:
    urls = ["--engine-url", f"http://127.0.0.1:{engine.port}", "--lmcache-url", f"http://127.0.0.1:{shared.http_port}"]
    options = ["--prompt", f"one {WORDS}", "--prompt", f"two {WORDS[:500]}", "--max-tokens", "4", "--format", "json"]
    command = [sys.executable, "-m", "lmcache_cli", "verify", "engine", *urls, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_S)
    metrics = json.loads(done.stdout)["metrics"]
    assert (done.returncode, metrics["num_equal"], metrics["num_compared"]) == (0, 2, 2), done.stdout + done.stderr
    assert metrics["logprob_difference_max"] < 0.05
    assert all(prompt["logprob_difference"] is not None for prompt in metrics["prompts"])


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 14), st.data())
def test_the_likeliest_are_those_of_a_stable_sort(values: list[int], num_top: int, data: Any) -> None:
    token = data.draw(st.integers(0, len(values) - 1))
    got = score(torch.tensor(values, dtype=torch.bfloat16), token, num_top, 0)
    expected = sorted(range(len(values)), key=lambda each: (-values[each], each))[:num_top]
    assert [each for each, _ in got.top] == expected
    logprobs = torch.log_softmax(torch.tensor(values, dtype=torch.float32), -1)
    assert got.logprob == float(logprobs[token])
    assert [logprob for _, logprob in got.top] == [float(logprobs[each]) for each in expected]


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_json_cannot_write_has_a_floor(value: float) -> None:
    got = score(torch.tensor([value, 1.0]), 0, 2, 0)
    assert got.logprob == FLOOR
    json.dumps(got.top, allow_nan=False)


def test_half_a_letter_is_named_by_its_id_and_tokens_written_alike_keep_the_likeliest() -> None:
    spell = models.ByteTokenizer().spell
    assert [name(token, spell, False) for token in (65, 0xC3, 256)] == ["A", "token_id:195", "token_id:256"]
    scored = score(torch.tensor([1.0, 3.0, 2.0]), 2, 3, 0)
    block = completion_block([scored], lambda token: "ab"[token > 0], False)
    assert block["tokens"] == ["b"]
    assert block["top_logprobs"] == [{"b": scored.top[0][1], "a": scored.top[2][1]}]
