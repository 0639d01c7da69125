"""What the server says over HTTP that it holds is what stock vLLM gets from it."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

from conftest import CHUNK, expected_hit, num_objects, prompt, wait_for
from engine import Engine, Server


def held_tokens(server: Server, tokens: list[int], salt: str = "") -> list[int]:
    """Held prefix for each model that the server has met."""
    body = json.dumps({"token_ids": tokens, "cache_salt": salt}).encode()
    url = f"http://127.0.0.1:{server.http_port}/cache/lookup"
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=30) as reply:
        answer: dict[str, Any] = json.load(reply)
    return [model["held_tokens"] for model in answer["models"]]


def test_what_is_said_to_be_held_is_what_the_engine_gets(engine: Engine, server: Server) -> None:
    first = prompt(70, 900)
    assert held_tokens(server, first) == [0]
    engine.generate([first])
    assert held_tokens(server, first) == [900 // CHUNK * CHUNK]
    other = [*first[:CHUNK], *prompt(71, 400)]
    assert held_tokens(server, other) == [CHUNK]
    assert held_tokens(server, first, "another tenant") == [0]
    assert engine.generate([first])["cached"] == [expected_hit(900)]
    assert engine.generate([other])["cached"] == [CHUNK]


def test_an_engine_whose_weights_changed_is_asked_about_as_what_it_is_now(engine: Engine, server: Server) -> None:
    entry = prompt(72, 600)
    engine.generate([entry])
    assert held_tokens(server, entry) == [512]
    held = num_objects(server)
    assert engine.call("reset", external=True)["reset"]
    wait_for(lambda: held_tokens(server, entry) == [0], "the server hears of the new namespace")
    engine.generate([entry])
    assert num_objects(server) == held + 2
    assert held_tokens(server, entry) == [512]
