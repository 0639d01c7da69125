"""Greedy answers of an engine to token ids under a cache salt, with what it tells of its first tokens' likelihoods."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache_cli import api
from lmcache_cli.client import Engine
from lmcache_cli.client.transport import count
from lmcache_cli.errors import BadAnswer, HttpFailure, WrongService

TOP = 5
"""Likeliest tokens that are asked for at each position."""

PATH_RESET = "/reset_prefix_cache"
RESET_S = 5.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Answer:
    """One greedy answer.

    Attributes:
        text: as the engine wrote it.
        pieces: its tokens, in whatever form the engine names tokens; None where it names none.
        top: for each of these tokens, log probabilities of the likeliest by name.
        prompt_tokens, cached_tokens: as the engine counted them; None where it does not tell.
        seconds: from just before the request to the whole answer.
    """

    text: str
    pieces: tuple[str, ...] | None
    top: tuple[Mapping[str, float], ...] | None
    prompt_tokens: int | None
    cached_tokens: int | None
    seconds: float


def new_salt() -> str:
    """A cache salt that nobody has used: a request with it finds no cache, in the engine or below."""
    return f"lmcache-{secrets.token_hex(16)}"


class GreedyEngine(Engine):
    """An engine that is asked one greedy completion after another."""

    _has_logprobs = True

    def ask(self, model: str, tokens: Sequence[int], max_tokens: int, salt: str | None) -> Answer:
        """POST /v1/completions, not streamed; the end-of-text token is ignored, so that answers have one length.

        Args:
            salt: None sends none.

        Raises:
            BadAnswer: the answer is no completion.
        """
        body: dict[str, Any] = {
            "model": model,
            "prompt": list(tokens),
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        if salt is not None:
            body["cache_salt"] = salt
        if self._has_logprobs:
            # names by id, where the engine knows how: two tokens may be written alike
            body |= {"logprobs": TOP, "return_tokens_as_token_ids": True}
        start_s = time.perf_counter()
        try:
            document = self._document("POST", api.ENGINE_PATH_COMPLETIONS, body)
        except HttpFailure as failure:
            if not (self._has_logprobs and failure.status in (400, 422) and "logprobs" in str(failure)):
                raise
            self._has_logprobs = False
            return self.ask(model, tokens, max_tokens, salt)
        return self._read(document, time.perf_counter() - start_s)

    def reset_prefix_cache(self) -> None:
        """POST /reset_prefix_cache: the engine forgets its own prefix cache; what lies below it stays.

        Raises:
            ServerError: it has no such endpoint, or could not for ``RESET_S``, because requests are running.
        """
        deadline = time.monotonic() + RESET_S
        try:
            while self._document("POST", PATH_RESET).get("success") is False:
                if time.monotonic() > deadline:
                    raise BadAnswer(f"{self._url}{PATH_RESET} resets nothing: requests are running")
                time.sleep(_POLL_S)
        except HttpFailure as failure:
            if failure.status not in (404, 405):
                raise
            raise WrongService(
                f"{self._url} cannot empty its prefix cache: start vLLM with VLLM_SERVER_DEV_MODE=1, or without the "
                "cache (--no-enable-prefix-caching)"
            ) from failure

    def _read(self, document: Mapping[str, Any], seconds: float) -> Answer:
        choices = document.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices else None
        text = choice.get("text") if isinstance(choice, Mapping) else None
        if not isinstance(choice, Mapping) or not isinstance(text, str):
            raise BadAnswer(f"what {self._url}{api.ENGINE_PATH_COMPLETIONS} answers is no completion")
        pieces, top = _logprobs(choice.get("logprobs"))
        usage = document.get("usage")
        details = usage.get("prompt_tokens_details") if isinstance(usage, Mapping) else None
        return Answer(text, pieces, top, count(usage, "prompt_tokens"), count(details, "cached_tokens"), seconds)


def _logprobs(block: object) -> tuple[tuple[str, ...] | None, tuple[Mapping[str, float], ...] | None]:
    """(tokens, the likeliest at each) of a completion's `logprobs`."""
    pieces = block.get("tokens") if isinstance(block, Mapping) else None
    if not isinstance(block, Mapping) or not isinstance(pieces, list) or not all(isinstance(p, str) for p in pieces):
        return None, None
    top = block.get("top_logprobs")
    if not isinstance(top, list) or len(top) != len(pieces):
        return tuple(pieces), None
    return tuple(pieces), tuple(_numbers(entry) for entry in top)


def _numbers(entry: object) -> Mapping[str, float]:
    if not isinstance(entry, Mapping):
        return {}
    numbers = {str(name): float(value) for name, value in entry.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
