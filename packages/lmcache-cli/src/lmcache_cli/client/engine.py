"""A serving engine's API, as OpenAI defines it and vLLM extends it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from lmcache_cli import api, failures
from lmcache_cli.client.transport import Service, bounded, count, translated
from lmcache_cli.errors import BadAnswer, CutShort, TimedOut, Unreachable

STREAM_BYTES_MAX = 256 << 20
LINE_BYTES_MAX = 4 << 20


@dataclass(frozen=True)
class TokenCount:
    """What an engine's tokenizer makes of a text."""

    count: int
    max_model_len: int | None
    tokens: list[int]


@dataclass(frozen=True)
class ServedModel:
    """One entry of an engine's list of models."""

    name: str
    max_model_len: int | None


class Engine(Service):
    """A serving engine. ``target.timeout_s`` is the longest wait for its next bytes."""

    def models(self) -> list[str]:
        """GET /v1/models: the names it serves, in its order."""
        return [model.name for model in self.served()]

    def served(self) -> list[ServedModel]:
        """GET /v1/models: what it serves, in its order."""
        entries = self._document("GET", api.ENGINE_PATH_MODELS).get("data")
        items = [item for item in entries if isinstance(item, dict)] if isinstance(entries, list) else []
        names = [(item.get("id"), count(item, "max_model_len")) for item in items]
        return [ServedModel(name, length) for name, length in names if isinstance(name, str)]

    def first_model(self) -> str:
        """The first model of the list.

        Raises:
            BadAnswer: the list is empty.
        """
        models = self.models()
        if not models:
            raise BadAnswer(f"{self._url} lists no models; name one with --model")
        return models[0]

    def health(self) -> None:
        """GET /health.

        Raises:
            HttpFailure: it answers anything but 200.
        """
        self._answer("GET", api.ENGINE_PATH_HEALTH)

    def metrics(self) -> str:
        """GET /metrics: Prometheus text."""
        return self._answer("GET", api.PATH_METRICS).decode("utf-8", "replace")

    def tokenize(self, model: str, prompt: str, add_special_tokens: bool = False) -> TokenCount:
        """POST /tokenize: ``prompt`` as this engine's tokens.

        Args:
            add_special_tokens: whether to add those that a completion of this text would get (a first `<s>`).

        Raises:
            HttpFailure: 404 where the engine has no such endpoint.
            BadAnswer: the answer holds no list of tokens.
        """
        body = {"model": model, "prompt": prompt, "add_special_tokens": add_special_tokens}
        document = self._document("POST", api.ENGINE_PATH_TOKENIZE, body)
        tokens = document.get("tokens")
        if not isinstance(tokens, list) or not all(isinstance(t, int) and t >= 0 for t in tokens):
            raise BadAnswer(f"what {self._url}{api.ENGINE_PATH_TOKENIZE} answers is no list of tokens")
        return TokenCount(len(tokens), count(document, "max_model_len"), tokens)

    def chat_usage(self, model: str, content: str, max_tokens: int = 1) -> int | None:
        """POST /v1/chat/completions with one message: the prompt tokens that it counted, template included."""
        messages = [{"role": "user", "content": content}]
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": 0}
        return count(self._document("POST", api.ENGINE_PATH_CHAT, body).get("usage"), "prompt_tokens")

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """POST ``body`` and yield the events of the answer as they arrive, until the `[DONE]` that must end it.

        Raises:
            CutShort: the stream ended without `[DONE]`.
            TimedOut: no event for the target's timeout.
            BadAnswer: the answer is no stream of JSON events, or the engine reported an error in it.
        """
        url = f"{self._url}{path}"
        seen = False
        try:
            for event in self._events(url, body):
                yield event
                seen = True
        except Unreachable as error:
            if not seen or isinstance(error, TimedOut):
                raise
            raise CutShort(f"{url} broke the stream off before its end, so nothing was measured") from error

    def _events(self, url: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        timeout = httpx.Timeout(self._target.timeout_s)
        seen = False
        with (
            translated(url, self._target.timeout_s),
            self._http.stream("POST", url, json=body, timeout=timeout) as response,
        ):
            if response.status_code != 200:
                raise failures.http_failure(url, response.status_code, bounded(response, url))
            for data in _event_data(response, url, self._target.timeout_s):
                if data == b"[DONE]":
                    return
                yield _event(data, url)
                seen = True
        if not seen:
            raise BadAnswer(f"{url} did not answer with a stream of events")
        raise CutShort(f"{url} ended the stream before its end, so nothing was measured")


def _event_data(response: httpx.Response, url: str, silence_s: float) -> Iterator[bytes]:
    """The payload of every `data:` line of a text/event-stream."""
    # not httpx's iter_lines: it also splits at U+2028 and the like, which JSON may hold unescaped
    rest = b""
    total = 0
    last_event = time.monotonic()
    for piece in response.iter_bytes():
        total += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                last_event = time.monotonic()
                yield line[5:].strip()
        if time.monotonic() - last_event > silence_s:  # comments that keep the connection alive are no progress
            raise failures.timed_out(url, silence_s)
        if total > STREAM_BYTES_MAX or len(rest) > LINE_BYTES_MAX:
            raise BadAnswer(f"the stream of {url} is longer than any answer to this request can be")
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _event(data: bytes, url: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"{url} sent an event that is not JSON") from error
    if not isinstance(event, dict):
        raise BadAnswer(f"{url} sent an event that is not a JSON object")
    if event.get("error"):
        raise BadAnswer(f"{url} reported an error: {failures.server_words(data) or 'without saying which'}")
    return event
