"""`describe engine`, `query kvcache`, `ping --wait`, completion."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving import Answer, json_answer, serve

Run = Callable[..., Any]
MODELS = json_answer({"data": [{"id": "m", "max_model_len": 4096}, {"id": "n"}]})
METRICS = Answer(
    body=b'# TYPE x gauge\nvllm:num_requests_running{engine="0"} 2.0\nvllm:num_requests_running{engine="1"} 1\n'
)
ENGINE = {"/health": json_answer({}), "/v1/models": MODELS, "/metrics": METRICS}


def test_an_engine_is_described(lmcache: Run) -> None:
    with serve(ENGINE) as server:
        ended = lmcache("describe", "engine", "--url", server.url)
    assert (ended.status, ended.err) == (0, "")
    assert ended.out == (
        "================ Inference Engine ================\n"
        "Model:                                           m\n"
        "Max context (tokens):                         4096\n"
        "Status:                                         OK\n"
        "Running requests:                                3\n"
        "==================================================\n"
    )


def test_what_an_engine_does_not_say_is_not_known(lmcache: Run) -> None:
    with serve({"/health": json_answer({}), "/v1/models": json_answer({"data": []})}) as server:
        ended = lmcache("describe", "engine", "--url", server.url, "--format", "json")
    metrics = json.loads(ended.out)["metrics"]
    assert (ended.status, metrics["model"], metrics["max_context"], metrics["running_requests"]) == (
        0,
        None,
        None,
        None,
    )


def test_an_unhealthy_engine_is_shown_and_fails(lmcache: Run) -> None:
    with serve({**ENGINE, "/health": Answer(503)}) as server:
        ended = lmcache("describe", "engine", "--url", server.url, "--format", "json")
    document = json.loads(ended.out)
    assert (ended.status, document["metrics"]["status"], document["error"]["code"]) == (1, "UNHEALTHY", "unhealthy")
    assert document["metrics"]["model"] == "m"


# --- query kvcache


def place(index: int, tier: str | None) -> dict[str, Any]:
    return {"index": index, "first_token": index * 256, "num_tokens": 256, "tier": tier}


TIERS = ["l1", "l1", "l1", None, "l1", None]
LOOKUP = {
    "chunk_size": 256,
    "num_tokens": 1600,
    "models": [
        {
            "model_name": "m",
            "engine": "vllm 0.32.0",
            "world_size": 2,
            "held_tokens": 768,
            "chunks": [place(i, tier) for i, tier in enumerate(TIERS)],
        }
    ],
}


def test_a_prompt_is_tokenised_by_the_engine_and_looked_up(lmcache: Run) -> None:
    tokens = list(range(1600))
    engine_answers = {**ENGINE, "/tokenize": json_answer({"count": 1600, "max_model_len": 4096, "tokens": tokens})}
    with serve(engine_answers) as engine, serve({"/cache/lookup": json_answer(LOOKUP)}) as server:
        words = ("query", "kvcache", "--url", server.url, "--engine-url", engine.url, "--prompt", "some text")
        ended = lmcache(*words, "--cache-salt", "tenant")
    assert (ended.status, ended.err) == (0, "")
    assert json.loads(engine.asked[-1].body)["prompt"] == "some text"
    asked = {"token_ids": tokens, "model_name": None, "cache_salt": "tenant"}
    assert json.loads(server.asked[0].body) == asked
    lines = ended.out.splitlines()
    assert lines[0] == "================= Query KV Cache ================="
    assert "Held tokens (prefix):                  768 (48.0%)" in lines
    assert "Held chunks:                                4 of 6" in lines
    assert any(line.endswith("0-2 l1, 3 not held, 4 l1, 5 not held") for line in lines)


def test_token_ids_need_no_engine(lmcache: Run, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("1, 2\n3 4,\n")
    places = [{**place(i, tier), "first_token": i, "num_tokens": 1} for i, tier in enumerate(("l1", None, "l1", "l1"))]
    held = {"chunk_size": 1, "num_tokens": 4, "models": [{"model_name": "m", "held_tokens": 1, "chunks": places}]}
    with serve({"/cache/lookup": json_answer(held)}) as server:
        words = ("query", "kvcache", "--url", server.url, "--format", "json", "--token-ids")
        ended = lmcache(*words, f"@{tmp_path / 'ids'}", "--model", "m")
        assert lmcache(*words, "5 6 7 8").status == 0
    assert [json.loads(asked.body)["token_ids"] for asked in server.asked] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert json.loads(server.asked[0].body)["model_name"] == "m"
    (model,) = json.loads(ended.out)["metrics"]["models"]
    assert (model["held_tokens"], model["num_chunks_by_tier"], model["num_chunks_held"]) == (1, {"l1": 3}, 3)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("--prompt", "a", "--token-ids", "1"),
        ("--token-ids", "one"),
        ("--token-ids", ""),
        ("--token-ids", "4294967296"),
        ("--token-ids", "9" * 5000),
        ("--token-ids", "1", "--cache-salt", "\udcff"),
        ("--token-ids", "1", "--model", "\udcff"),
        ("--prompt", "\udcff"),
    ],
)
def test_a_look_up_without_sense_asks_nobody(lmcache: Run, words: tuple[str, ...]) -> None:
    with serve({}) as server:
        ended = lmcache("query", "kvcache", "--url", server.url, *words)
    assert (ended.status, ended.err.count("\n"), server.asked) == (2, 1, [])


def test_a_server_without_look_ups_is_told_apart_from_one_without_the_model(lmcache: Run) -> None:
    words = ("query", "kvcache", "--token-ids", "1", "--url")
    with serve({"/status": json_answer({"is_healthy": True})}) as server:
        ended = lmcache(*words, server.url)
    assert (ended.status, "cannot look prompts up over HTTP" in ended.err) == (1, True)
    unknown = json_answer({"detail": "no engine with the model x has registered here: it has met m"}, 404)
    with serve({"/cache/lookup": unknown}) as server:
        ended = lmcache(*words, server.url)
    assert (ended.status, "it has met m" in ended.err) == (1, True)


# --- ping --wait


def test_waiting_ends_when_the_server_is_there(lmcache: Run) -> None:
    with serve({"/healthcheck": Answer(503)}) as server:

        def recover() -> None:
            while len(server.asked) < 2:
                time.sleep(0.01)
            server.answers["/healthcheck"] = json_answer({})

        thread = threading.Thread(target=recover)
        thread.start()
        ended = lmcache("ping", "kvcache", "--url", server.url, "--wait", "30")
        thread.join(30)
    assert ended.status == 0
    assert len(server.asked) >= 3


def test_waiting_ends_when_the_time_is_over(lmcache: Run) -> None:
    ended = lmcache("ping", "kvcache", "--url", "127.0.0.1:1", "--wait", "0.5", "--format", "json")
    assert ended.status == 1
    error = json.loads(ended.out)["error"]
    assert (error["code"], "still so after waiting 0.5 s" in error["message"]) == ("unreachable", True)


# --- completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script(lmcache: Run, shell: str) -> None:
    ended = lmcache("completion", shell)
    assert (ended.status, ended.err) == (0, "")
    assert "_LMCACHE_COMPLETE" in ended.out


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_our_words(process: Run, tmp_path: Path) -> None:
    command = tmp_path / "lmcache"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lmcache_cli "$@"\n')
    command.chmod(0o755)
    script = process("completion", "bash").out + (
        'COMP_WORDS=(lmcache ping kv); COMP_CWORD=2; _lmcache_completion lmcache; echo "${COMPREPLY[@]}"\n'
        'COMP_WORDS=(lmcache qu); COMP_CWORD=1; COMPREPLY=(); _lmcache_completion lmcache; echo "${COMPREPLY[@]}"\n'
    )
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, env=environment)
    assert done.stdout.split("\n")[:2] == ["kvcache", "query quota"]


# --- what the other side leaves open


@pytest.mark.parametrize(
    ("status", "shown", "exit_status", "code"),
    [(404, None, 0, None), (401, None, 1, "http_401"), (500, "UNHEALTHY", 1, "unhealthy")],
)
def test_only_an_engine_that_says_so_is_unhealthy(
    lmcache: Run, status: int, shown: str | None, exit_status: int, code: str | None
) -> None:
    with serve({**ENGINE, "/health": Answer(status)}) as server:
        ended = lmcache("describe", "engine", "--url", server.url, "--format", "json")
    document = json.loads(ended.out)
    assert (ended.status, document["metrics"]["status"], document["metrics"]["model"]) == (exit_status, shown, "m")
    assert document.get("error", {}).get("code") == code


def test_an_engine_whose_health_check_breaks_off_is_still_described(lmcache: Run) -> None:
    cut = Answer(pieces=(b"x",), headers={"Content-Length": "9"})
    with serve({**ENGINE, "/health": cut}) as server:
        ended = lmcache("describe", "engine", "--url", server.url, "--format", "json")
    document = json.loads(ended.out)
    assert (ended.status, document["metrics"]["status"], document["metrics"]["model"]) == (1, None, "m")
    assert document["error"]["code"] == "unreachable"


def test_chunks_that_a_server_does_not_list_are_not_counted_as_none(lmcache: Run) -> None:
    reply = {"chunk_size": 2, "models": [{"model_name": "m", "held_tokens": 2}]}
    with serve({"/cache/lookup": json_answer(reply)}) as server:
        words = ("query", "kvcache", "--url", server.url, "--token-ids", "1,2,3,4")
        assert "0 of 0" not in lmcache(*words).out
        (model,) = json.loads(lmcache(*words, "--format", "json").out)["metrics"]["models"]
    assert (model["num_chunks"], model["num_chunks_held"], model["num_chunks_by_tier"]) == (None, None, None)


def test_an_answer_that_is_no_look_up_is_a_failure(lmcache: Run) -> None:
    with serve({"/cache/lookup": json_answer({})}) as server:
        ended = lmcache("query", "kvcache", "--url", server.url, "--token-ids", "1")
    assert (ended.status, ended.out, "is no look-up" in ended.err) == (1, "", True)


@pytest.mark.parametrize(
    ("claim", "said"),
    [
        ({"held_tokens": 5}, "claims to hold 5 tokens of a prompt of 4"),
        ({"held_tokens": -1}, "claims to hold -1 tokens of a prompt of 4"),
        ({"held_tokens": 4, "chunks": [place(i, "l1") for i in range(3)]}, "lists 3 chunks of 2 tokens of a prompt of"),
    ],
)
def test_a_server_that_claims_more_than_was_asked_about_is_not_believed(lmcache: Run, claim: Any, said: str) -> None:
    reply = {"chunk_size": 2, "models": [{"model_name": "m", **claim}]}
    with serve({"/cache/lookup": json_answer(reply)}) as server:
        ended = lmcache("query", "kvcache", "--url", server.url, "--token-ids", "1,2,3,4")
    assert (ended.status, ended.out, ended.err.count("\n")) == (1, "", 1)
    assert said in ended.err


@pytest.mark.parametrize("chunk_size", [0, -256])
def test_a_chunk_without_tokens_is_no_look_up(lmcache: Run, chunk_size: int) -> None:
    with serve({"/cache/lookup": json_answer({"chunk_size": chunk_size, "models": []})}) as server:
        ended = lmcache("query", "kvcache", "--url", server.url, "--token-ids", "1")
    assert (ended.status, ended.out, "is no look-up" in ended.err) == (1, "", True)
