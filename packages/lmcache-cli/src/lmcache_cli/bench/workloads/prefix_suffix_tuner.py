"""prefix-suffix-tuner: two passes over more prefixes than a tier holds; what the second one finds tells which tier.

Each prompt is prefix, breaker, suffix: the prefix comes in both passes, the breaker never again, the suffix is the same
in all prompts, so that only a cache that does not go by prefixes alone finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lmcache_cli.bench.base import Listed, Option, Pacing, Plan, Request, Source, Texts
from lmcache_cli.bench.workloads.common import DOCUMENT_TOKENS_MAX, check_size, user
from lmcache_cli.errors import UsageFault

BREAKER_TOKENS = 32
SUFFIX_TOKENS_MIN = 100
OVERFLOW = 1.05
"""By so much the prefixes are more than the tier that they are to overflow."""


class PrefixSuffixTuner:
    """Both passes in the same order, one request after another; the first is the warm-up."""

    name: ClassVar[str] = "prefix-suffix-tuner"
    summary: ClassVar[str] = "Two passes over more prefixes than a tier holds (L0, L1, L2)."
    options: ClassVar[tuple[Option, ...]] = (
        Option("psf_context_length", int, 8000, "Tokens of a prompt", 1, DOCUMENT_TOKENS_MAX),
        Option("psf_prefix_ratio", float, 0.8, "Share of the prefix in a prompt", 0, 1, is_open=True),
        Option("psf_thrash", float, 20.0, "Size of the tier to overflow (GB)", 0, 1e6, is_open=True),
    )
    uses_volume: ClassVar[bool] = True
    volume_key: ClassVar[str | None] = "psf_thrash"
    pacing_keys: ClassVar[tuple[str, ...]] = ()
    pause_s = 5.0

    def __init__(self, settings: Mapping[str, Any], seed: int, volume_tokens: int | None) -> None:  # noqa: ARG002
        self._length = settings["psf_context_length"]
        self._prefix = round(self._length * settings["psf_prefix_ratio"])
        self._suffix = self._length - self._prefix - BREAKER_TOKENS
        if self._suffix < SUFFIX_TOKENS_MIN:
            raise UsageFault(
                f"of {self._length} tokens a prefix of {self._prefix} leaves {max(self._suffix, 0)} for the suffix, "
                f"which needs {SUFFIX_TOKENS_MIN}: raise --psf-context-length or lower --psf-prefix-ratio"
            )
        self._num_prefixes = max(1, int((volume_tokens or 0) * OVERFLOW) // self._length)
        self._prefixes: list[str] = []
        self._breakers: list[list[str]] = []
        self._suffix_text = ""
        check_size(self.plan().distinct_tokens, self._num_prefixes, "lower --psf-thrash")

    def plan(self) -> Plan:
        """As many prefixes as overflow the tier."""
        num = self._num_prefixes
        distinct = num * (self._prefix + 2 * BREAKER_TOKENS) + self._suffix
        return Plan(num, num, num * self._length, distinct, 1, (("prefixes", num),))

    def prepare(self, texts: Texts) -> None:
        """Make the prefixes, two breakers for each, and the suffix."""
        indices = range(self._num_prefixes)
        self._prefixes = [texts.words(self._prefix, "prefix", index) for index in indices]
        self._breakers = [[texts.words(BREAKER_TOKENS, "breaker", turn, index) for index in indices] for turn in (1, 2)]
        self._suffix_text = texts.words(self._suffix, "suffix")

    def warmup(self) -> Sequence[Request]:
        """The first pass."""
        return self._pass(1)

    def source(self) -> Source:
        """The second pass."""
        return Listed(self._pass(2))

    def pacing(self) -> Pacing:
        """One after another."""
        return Pacing(concurrency=1)

    def _pass(self, turn: int) -> list[Request]:
        return [
            Request(
                f"pass{turn}_p{index}",
                user(f"{prefix} {self._breakers[turn - 1][index]} {self._suffix_text}"),
                1,
                f"prefix {index}",
                is_first=turn == 1,
            )
            for index, prefix in enumerate(self._prefixes)
        ]
