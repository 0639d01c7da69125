"""One streamed completion, measured.

The formulas are those of the reference: decode time = total - time to first token; time per output token = decode
time / output tokens; throughput = output tokens / decode time. They divide by n and not by the n - 1 tokens that
arrive after the first one, because the reference's sample (9 tokens, 26.88 ms, 35.05 ms -> 0.91 ms, 1100.64 tokens/s)
is met by n alone: 8.177 ms / 9 = 0.91, while 8.177 / 8 would print 1.02. Values are rounded only for display: 1100.64
needs a decode time of 8.177 ms, inside the 8.17 +- 0.01 ms that the two rounded times leave. Token counts come from
the engine's usage block and from nowhere else; without it, and where fewer than two tokens leave nothing to divide,
the value is None.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmcache_cli import api
from lmcache_cli.client import Engine
from lmcache_cli.errors import HttpFailure

_TEXT_KEYS = ("content", "reasoning_content", "reasoning")


@dataclass(frozen=True)
class Completion:
    """What one request took. Times in seconds from just before it was sent; tokens as the engine counted them.

    Attributes:
        ttft_s: until the first text that is not empty (reasoning included); None when there was none.
        total_s: until the end of the stream.
        cached_tokens: prompt tokens that the engine did not compute.
    """

    model: str
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    ttft_s: float | None
    total_s: float

    @property
    def tpot_ms(self) -> float | None:
        """Milliseconds per output token after the first text."""
        decode_s = self._decode_s()
        return decode_s * 1e3 / self.output_tokens if decode_s and self.output_tokens else None

    @property
    def throughput_tokens_per_s(self) -> float | None:
        """Output tokens per second of decoding (prefill not counted)."""
        decode_s = self._decode_s()
        return self.output_tokens / decode_s if decode_s and self.output_tokens else None

    def _decode_s(self) -> float | None:
        if self.ttft_s is None or self.output_tokens is None or self.output_tokens < 2:
            return None
        return self.total_s - self.ttft_s


def complete(
    engine: Engine, model: str, prompt: str, max_tokens: int, clock: Callable[[], float] = time.perf_counter
) -> Completion:
    """Send ``prompt`` and measure the streamed answer: /v1/completions, or chat where an engine has no completions."""
    request = {
        "model": model,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        return _measure(engine, api.ENGINE_PATH_COMPLETIONS, {**request, "prompt": prompt}, clock)
    except HttpFailure as failure:
        if failure.status not in (404, 405):
            raise
    messages = [{"role": "user", "content": prompt}]
    return _measure(engine, api.ENGINE_PATH_CHAT, {**request, "messages": messages}, clock)


def _measure(engine: Engine, path: str, request: Mapping[str, Any], clock: Callable[[], float]) -> Completion:
    usage: Mapping[str, Any] = {}
    ttft_s = None
    start_s = clock()
    for event in engine.stream(path, request):
        if ttft_s is None and _has_text(event):
            ttft_s = clock() - start_s
        if isinstance(event.get("usage"), Mapping):
            usage = event["usage"]  # some engines send a running count; the last one is the sum
    total_s = clock() - start_s
    return Completion(
        model=str(request["model"]),
        prompt_tokens=_count(usage, "prompt_tokens"),
        output_tokens=_count(usage, "completion_tokens"),
        cached_tokens=_count(usage.get("prompt_tokens_details"), "cached_tokens"),
        ttft_s=ttft_s,
        total_s=total_s,
    )


def _has_text(event: Mapping[str, Any]) -> bool:
    choices = event.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, Mapping):
            continue
        delta = choice.get("delta")
        if choice.get("text") or (isinstance(delta, Mapping) and any(delta.get(key) for key in _TEXT_KEYS)):
            return True
    return False


def _count(block: object, key: str) -> int | None:
    value = block.get(key) if isinstance(block, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
