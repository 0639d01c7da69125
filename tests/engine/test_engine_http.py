"""The engine's API as a client sees it, over real sockets to a real process."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHUNK
from engine_running import Engine
from server_running import Server, eventually, running

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 20


@pytest.fixture(scope="module")
def engine(shared: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine whose KV is kept."""
    with Engine(tmp_path_factory.mktemp("engine"), shared.rpc) as made:
        yield made


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine without a server."""
    with Engine(tmp_path_factory.mktemp("alone")) as made:
        yield made


def test_models_and_tokenize_say_what_a_completion_counts(engine: Engine) -> None:
    status, models = engine.call("GET", "/v1/models")
    assert status == 200
    (card,) = models["data"]
    assert card["max_model_len"] == 16384
    for prompt in ("héllo ✓", TEXT):
        status, tokens = engine.call("POST", "/tokenize", {"model": card["id"], "prompt": prompt})
        assert status == 200
        assert tokens == {
            "count": len(prompt.encode()),
            "max_model_len": 16384,
            "tokens": list(prompt.encode()),
            "token_strs": None,
        }
        usage = engine.complete(prompt, model=card["id"], max_tokens=1)["usage"]
        assert usage["prompt_tokens"] == tokens["count"]


def test_tokenize_counts_messages_as_chat_does(engine: Engine) -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    _, tokens = engine.call("POST", "/tokenize", {"messages": messages})
    _, chat = engine.call("POST", "/v1/chat/completions", {"messages": messages, "max_tokens": 1})
    assert chat["usage"]["prompt_tokens"] == tokens["count"]


def test_a_prompt_asked_again_is_reused_also_by_an_engine_started_later(
    engine: Engine, alone: Engine, shared: Server, tmp_path: Path
) -> None:
    prompt = f"reuse {TEXT}"
    whole = len(prompt) // CHUNK * CHUNK
    expected = alone.answer(prompt)[1]
    assert engine.answer(prompt) == (0, expected)
    assert engine.answer(prompt) == (whole, expected)
    with Engine(tmp_path, shared.rpc) as later:
        assert later.answer(prompt) == (whole, expected)
        assert later.answer(list(prompt.encode())) == (whole, expected)
        assert later.answer(prompt, cache_salt="other tenant") == (0, expected)


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_stream_says_the_same_as_the_whole_answer(engine: Engine, is_chat: bool) -> None:
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]} if is_chat else {"prompt": "hi"}
    body = {**asked, "temperature": 0, "max_tokens": 20, "ignore_eos": True}
    status, whole = engine.call("POST", path, body)
    assert status == 200
    *pieces, end, usage = engine.stream(path, body)
    (choice,) = whole["choices"]
    if is_chat:
        assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
        assert "".join(p["choices"][0]["delta"]["content"] for p in pieces) == choice["message"]["content"]
    else:
        assert "".join(p["choices"][0]["text"] for p in pieces) == choice["text"]
    assert len(pieces) == 20  # every token is an event of its own
    assert [p["choices"][0]["finish_reason"] for p in pieces] == [None] * 20
    assert end["choices"][0]["finish_reason"] == choice["finish_reason"] == "length"
    assert usage["choices"] == []
    assert usage["usage"] == whole["usage"]
    assert usage["usage"]["completion_tokens"] == 20


def test_the_same_seed_says_the_same_and_another_something_else(alone: Engine) -> None:
    answers = [alone.answer("seeded", temperature=1.5, seed=seed, max_tokens=40)[1] for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_a_stop_string_ends_the_answer_and_is_left_out(alone: Engine) -> None:
    text = alone.answer("stop here", max_tokens=40)[1]
    stop = text[10:13]
    document = alone.complete("stop here", ignore_eos=True, max_tokens=40, stop=["never said at all", stop])
    (choice,) = document["choices"]
    assert choice == {"index": 0, "logprobs": None, "finish_reason": "stop", "text": text[: text.index(stop)]}
    events = alone.stream("/v1/completions", {"prompt": "stop here", "temperature": 0, "max_tokens": 40, "stop": stop})
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == text[: text.index(stop)]


BAD: list[tuple[str, Any, int]] = [
    ("/v1/completions", b"{", 400),
    ("/v1/completions", b"[1]", 400),
    ("/v1/completions", b"[" * 100_000, 400),
    ("/v1/completions", {}, 400),
    ("/v1/completions", {"prompt": ""}, 400),
    ("/v1/completions", {"prompt": ["a", "b"]}, 400),
    ("/v1/completions", {"prompt": [1, -1]}, 400),
    ("/v1/completions", {"prompt": [257]}, 400),
    ("/v1/completions", {"prompt": [True]}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": 1.5}, 400),
    ("/v1/completions", {"prompt": "a", "max_tokens": 16384}, 400),
    ("/v1/completions", {"prompt": "a" * 16384, "max_tokens": 1}, 400),
    ("/v1/completions", {"prompt": "a", "temperature": -1}, 400),
    ("/v1/completions", {"prompt": "a", "temperature": "hot"}, 400),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    ("/v1/completions", {"prompt": "a", "seed": -1}, 400),
    ("/v1/completions", {"prompt": "a", "stop": [1]}, 400),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, 400),
    ("/v1/completions", {"prompt": "a", "stream": "yes"}, 400),
    ("/v1/completions", {"prompt": "a", "stream_options": 1}, 400),
    ("/v1/completions", {"prompt": "a", "n": 2}, 400),
    ("/v1/completions", {"prompt": "a", "top_p": 0.5}, 400),
    ("/v1/completions", {"prompt": "a", "cache_salt": 1}, 400),
    ("/v1/completions", {"prompt": "a", "logprobs": 6}, 400),
    ("/v1/completions", {"prompt": "a", "logprobs": -1}, 400),
    ("/v1/completions", {"prompt": "a", "logprobs": True}, 400),
    ("/v1/completions", {"prompt": "a", "logprobs": 1, "top_logprobs": 1}, 400),
    ("/v1/completions", {"prompt": "a", "prompt_logprobs": 1}, 400),
    ("/v1/completions", {"prompt": "a", "return_tokens_as_token_ids": 1}, 400),
    ("/v1/completions", {"prompt": "a", "model": "other"}, 404),
    ("/v1/completions", b" " * ((16 << 20) + 1), 413),
    ("/v1/chat/completions", {"prompt": "a"}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {"messages": ["hi"]}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "logprobs": 1}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_logprobs": 1}, 400),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 21},
        400,
    ),
    ("/tokenize", {"prompt": 1}, 400),
]


@pytest.mark.parametrize(("path", "body", "expected"), BAD, ids=range(len(BAD)))
def test_bad_input_is_answered_with_one_sentence(alone: Engine, path: str, body: Any, expected: int) -> None:
    status, document = alone.call("POST", path, body)
    assert status == expected, document
    assert document["error"]["code"] == expected
    assert document["error"]["type"]
    assert 0 < len(document["error"]["message"]) < 300
    assert alone.answer("still there", max_tokens=2)[1]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_its_generation(alone: Engine, stream: bool) -> None:
    before = alone.ended("cancelled")
    connection = alone.begin(max_tokens=16000, stream=stream)
    eventually(lambda: alone.metric("requests_running") == 1, "it is computed")
    connection.close()
    eventually(lambda: alone.ended("cancelled") == before + 1, "its generation ends")
    assert alone.answer("next", max_tokens=2)[1]


def test_a_full_queue_refuses_one_more_and_goes_on(alone: Engine) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(alone.begin(max_tokens=16000))
        eventually(lambda: alone.metric("requests_running") == 1, "the first is computed")
        waiting = [stack.enter_context(alone.begin(max_tokens=1)) for _ in range(64)]
        eventually(lambda: alone.metric("requests_waiting") == 64, "the queue is full")
        status, document = alone.call("POST", "/v1/completions", {"prompt": "one more"})
        assert (status, document["error"]["code"]) == (503, 503)
        assert alone.ended("refused") >= 1
        first.close()
        assert all(connection.recv(12) == b"HTTP/1.1 200" for connection in waiting)
    assert alone.answer("after that", max_tokens=2)[1]


def test_the_engine_answers_while_its_server_dies_and_comes_back(tmp_path: Path, alone: Engine) -> None:
    prompt = f"faults {TEXT}"
    expected = alone.answer(prompt)[1]
    whole = len(prompt) // CHUNK * CHUNK
    with running(str(tmp_path), pool_gb=0.25) as server, Engine(tmp_path, server.rpc) as engine:
        assert engine.answer(prompt) == (0, expected)
        server.kill()
        assert engine.answer(prompt) == (0, expected)
        assert engine.metric("cache_attached") == 0
        server.start()
        eventually(lambda: engine.answer(prompt) == (whole, expected), "what was stored is found again")


def test_sigterm_ends_an_engine_that_generates(tmp_path: Path) -> None:
    with Engine(tmp_path) as engine, engine.begin(max_tokens=16000, stream=True) as connection:
        assert connection.recv(12) == b"HTTP/1.1 200"
        engine.process.send_signal(signal.SIGTERM)
        assert engine.stop() == 0
        said = b"".join(iter(lambda: connection.recv(65536), b""))
        assert b"the engine is stopping" in said
        assert "Traceback" not in engine.log.read_text()


def test_a_model_directory_is_served(tmp_path: Path, shared: Server) -> None:
    from models import make_model

    folder = make_model(tmp_path / "tiny-llama", "tiny-llama")
    with Engine(tmp_path, shared.rpc, "--model", str(folder), "--max-model-len", "4096") as engine:
        (card,) = engine.call("GET", "/v1/models")[1]["data"]
        assert (card["id"], card["max_model_len"]) == ("tiny-llama", 4096)
        count = engine.call("POST", "/tokenize", {"prompt": TEXT})[1]["count"]
        assert CHUNK < count < len(TEXT)
        cold, warm = engine.answer(TEXT), engine.answer(TEXT)
        assert (cold[0], warm) == (0, (count // CHUNK * CHUNK, cold[1]))
        messages = [{"role": "user", "content": "hi"}]
        assert engine.stream("/v1/chat/completions", {"messages": messages, "max_tokens": 4})
