"""random-prefill: long prompts that share nothing, all sent at once; nothing but prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lmcache_cli.bench.base import Listed, Option, Pacing, Plan, Request, Source, Texts
from lmcache_cli.bench.workloads.common import DOCUMENT_TOKENS_MAX, check_size, user


class RandomPrefill:
    """One output token a prompt."""

    name: ClassVar[str] = "random-prefill"
    summary: ClassVar[str] = "Prefill-only requests, all at once, nothing to reuse."
    options: ClassVar[tuple[Option, ...]] = (
        Option("rp_request_length", int, 10000, "Tokens of a request", 1, DOCUMENT_TOKENS_MAX),
        Option("rp_num_requests", int, 50, "Requests", 1, 4096),
    )
    uses_volume: ClassVar[bool] = False
    volume_key: ClassVar[str | None] = None
    pacing_keys: ClassVar[tuple[str, ...]] = ()
    pause_s = 0.0

    def __init__(self, settings: Mapping[str, Any], seed: int, volume_tokens: int | None) -> None:  # noqa: ARG002
        self._length = settings["rp_request_length"]
        self._num_requests = settings["rp_num_requests"]
        self._prompts: list[str] = []
        check_size(self.plan().distinct_tokens, self._num_requests, "lower --rp-num-requests")

    def plan(self) -> Plan:
        """No warm-up."""
        tokens = self._num_requests * self._length
        return Plan(self._num_requests, 0, tokens, tokens, 1, (("prompts", self._num_requests),))

    def prepare(self, texts: Texts) -> None:
        """Make the prompts."""
        self._prompts = [texts.words(self._length, "prompt", index) for index in range(self._num_requests)]

    def warmup(self) -> Sequence[Request]:
        """None."""
        return ()

    def source(self) -> Source:
        """Every prompt once."""
        return Listed(
            [
                Request(f"prefill_{index}", user(text), 1, f"prompt {index}", is_first=True)
                for index, text in enumerate(self._prompts)
            ]
        )

    def pacing(self) -> Pacing:
        """All at once."""
        return Pacing(concurrency=self._num_requests)
