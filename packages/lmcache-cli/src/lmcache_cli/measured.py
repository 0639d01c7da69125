"""One streamed completion, measured.

TTFT runs from just before the request is sent to the first text that is not empty (reasoning counts); time per output
token is (last text - first text) / (n - 1), since the first token came with the prefill; throughput is its inverse.
The reference's sample divides by n, so its numbers do not follow from these formulas; that is on purpose. Token counts
come from the engine's usage block and from nowhere else; without it, and where fewer than two tokens leave nothing to
divide, the value is None.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_cli import api
from lmcache_cli.client import Engine
from lmcache_cli.client.transport import count
from lmcache_cli.errors import CutShort, HttpFailure, Unreachable

_REASONING_KEYS = ("reasoning_content", "reasoning")

_NO_COMPLETIONS = re.compile(r"not support\b.*\bcompletions", re.IGNORECASE)

Clock = Callable[[], float]
Listener = Callable[[str], None]


@dataclass(frozen=True)
class Completion:
    """What one request took. Times in seconds from just before it was sent; tokens as the engine counted them.

    Attributes:
        answer: the text, reasoning left out.
        ttft_s: until the first text that is not empty (reasoning included); None when there was none.
        last_s: until the last such text.
        total_s: until the end of the stream.
        cached_tokens: prompt tokens that the engine did not compute.
    """

    model: str
    answer: str
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    ttft_s: float | None
    last_s: float | None
    total_s: float

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds per output token after the first."""
        if self.ttft_s is None or self.last_s is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.last_s - self.ttft_s) * 1e3 / (self.output_tokens - 1)

    @property
    def throughput_tokens_per_s(self) -> float | None:
        """Output tokens per second of decoding: 1000 / TPOT (prefill not counted)."""
        return 1e3 / self.tpot_ms if self.tpot_ms else None


def complete(
    engine: Engine,
    model: str,
    prompt: str,
    max_tokens: int,
    endpoint: str | None = None,
    listener: Listener | None = None,
    clock: Clock = time.perf_counter,
) -> Completion:
    """Send ``prompt`` and measure the streamed answer.

    Args:
        endpoint: `completions` or `chat`; None: completions, or chat where an engine has none, or says so.
        listener: gets every piece of the answer as it arrives.

    Raises:
        CutShort: the stream ended without saying that the answer is complete.
    """
    request = {
        "model": model,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint != "chat":
        try:
            body = {**request, "prompt": prompt}
            return _measure(engine, api.ENGINE_PATH_COMPLETIONS, body, listener, clock)
        except HttpFailure as failure:
            if endpoint is not None or not _lacks_completions(failure):
                raise
    messages = [{"role": "user", "content": prompt}]
    return _measure(engine, api.ENGINE_PATH_CHAT, {**request, "messages": messages}, listener, clock)


def _lacks_completions(failure: HttpFailure) -> bool:
    return failure.status in (404, 405) or (failure.status == 400 and bool(_NO_COMPLETIONS.search(str(failure))))


def _measure(
    engine: Engine, path: str, request: Mapping[str, Any], listener: Listener | None, clock: Clock
) -> Completion:
    usage: Mapping[str, Any] = {}
    ttft_s = last_s = None
    is_finished = False
    pieces = []
    start_s = clock()
    try:
        for event in engine.stream(path, request):
            now_s = clock() - start_s
            answer, reasoning, has_ended = _read(event)
            is_finished = is_finished or has_ended
            if answer or reasoning:
                ttft_s = now_s if ttft_s is None else ttft_s
                last_s = now_s
            if answer:
                pieces.append(answer)
                if listener is not None:
                    listener(answer)
            if isinstance(event.get("usage"), Mapping):
                usage = event["usage"]  # some engines send a running count; the last one is the sum
    except CutShort as error:
        # some engines end after the finish reason, without [DONE]; a connection that broke is no such end
        if not is_finished or isinstance(error.__cause__, Unreachable):
            raise
    return Completion(
        model=str(request["model"]),
        answer="".join(pieces),
        prompt_tokens=count(usage, "prompt_tokens"),
        output_tokens=count(usage, "completion_tokens"),
        cached_tokens=count(usage.get("prompt_tokens_details"), "cached_tokens"),
        ttft_s=ttft_s,
        last_s=last_s,
        total_s=clock() - start_s,
    )


def _read(event: Mapping[str, Any]) -> tuple[str, str, bool]:
    """(answer, reasoning, whether it ends) of one event of either endpoint."""
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, Mapping):
        return "", "", False
    delta = choice.get("delta")
    delta = delta if isinstance(delta, Mapping) else {}
    answer = choice.get("text") or delta.get("content") or ""
    reasoning = next((delta[key] for key in _REASONING_KEYS if delta.get(key)), "")
    has_ended = bool(choice.get("finish_reason"))
    return answer if isinstance(answer, str) else "", reasoning if isinstance(reasoning, str) else "", has_ended
