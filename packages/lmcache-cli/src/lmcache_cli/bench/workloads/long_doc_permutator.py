"""long-doc-permutator: the same contexts in ever other orders, behind one system prompt.

A prefix cache finds the system prompt and what two orders begin with in common; a cache of blocks wherever they stand
would find it all. Orders are drawn at random without repetition, so that no context stands in front more often than
chance has it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lmcache_cli.bench.base import Listed, Option, Pacing, Plan, Request, Source, Texts
from lmcache_cli.bench.workloads.common import DOCUMENT_TOKENS_MAX, check_size, user

LISTED_CONTEXTS_MAX = 8
"""Up to 8! = 40,320 orders are listed and drawn from; of more contexts orders are drawn one by one."""


class LongDocPermutator:
    """One request an order."""

    name: ClassVar[str] = "long-doc-permutator"
    summary: ClassVar[str] = "Permutations of context documents behind one system prompt."
    options: ClassVar[tuple[Option, ...]] = (
        Option("ldp_num_contexts", int, 5, "Context documents", 1, 1000),
        Option("ldp_context_length", int, 5000, "Tokens of a context", 1, DOCUMENT_TOKENS_MAX),
        Option("ldp_system_prompt_length", int, 1000, "Tokens of the system prompt (0 = none)", 0, DOCUMENT_TOKENS_MAX),
        Option("ldp_num_permutations", int, 10, "Orders to send", 1, 100_000),
        Option("ldp_num_inflight_requests", int, 1, "Requests in flight", 1, 4096),
        Option("ldp_max_output_length", int, 128, "Tokens of an answer, at most", 1, 1_000_000),
    )
    uses_volume: ClassVar[bool] = False
    volume_key: ClassVar[str | None] = None
    pacing_keys: ClassVar[tuple[str, ...]] = ("ldp_num_inflight_requests",)
    pause_s = 0.0

    def __init__(self, settings: Mapping[str, Any], seed: int, volume_tokens: int | None) -> None:  # noqa: ARG002
        self._settings = settings
        self._seed = seed
        self._num_contexts = settings["ldp_num_contexts"]
        possible = math.factorial(min(self._num_contexts, 20))
        self._num_requests = min(settings["ldp_num_permutations"], possible)
        self._contexts: list[str] = []
        self._system = ""
        plan = self.plan()
        what = "lower --ldp-num-permutations or --ldp-context-length"
        check_size(plan.prompt_tokens or 0, self._num_requests, what)

    def plan(self) -> Plan:
        """As many orders as asked for, or as there are."""
        system, length = self._settings["ldp_system_prompt_length"], self._settings["ldp_context_length"]
        return Plan(
            num_requests=self._num_requests,
            num_warmup_requests=1,
            prompt_tokens=self._num_requests * (system + self._num_contexts * length),
            distinct_tokens=system + self._num_contexts * length,
            output_tokens_max=self._settings["ldp_max_output_length"],
            documents=(("contexts", self._num_contexts), ("permutations", self._num_requests)),
        )

    def prepare(self, texts: Texts) -> None:
        """Make the system prompt and the contexts."""
        length = self._settings["ldp_context_length"]
        system = self._settings["ldp_system_prompt_length"]
        self._system = texts.words(system, "system") if system else ""
        self._contexts = [texts.words(length, "context", index) for index in range(self._num_contexts)]

    def warmup(self) -> Sequence[Request]:
        """One request that has nothing to do with the others."""
        return [Request("warmup", user("Say hello."), 1)]

    def source(self) -> Source:
        """Every order once; the first one that begins with a context is the first of its group."""
        requests, seen = [], set()
        for index, order in enumerate(self._orders()):
            messages = [{"role": "system", "content": self._system}] if self._system else []
            messages.append({"role": "user", "content": "\n\n".join(self._contexts[item] for item in order)})
            group = f"context {order[0]} in front"
            max_tokens = self._settings["ldp_max_output_length"]
            requests.append(Request(f"perm{index}_req{index}", messages, max_tokens, group, order[0] not in seen))
            seen.add(order[0])
        return Listed(requests)

    def pacing(self) -> Pacing:
        """So many in flight."""
        return Pacing(concurrency=self._settings["ldp_num_inflight_requests"])

    def _orders(self) -> list[tuple[int, ...]]:
        chance = random.Random(repr((self._seed, "orders")))
        indices = range(self._num_contexts)
        if self._num_contexts <= LISTED_CONTEXTS_MAX:
            return chance.sample(list(itertools.permutations(indices)), self._num_requests)
        drawn: dict[tuple[int, ...], None] = {}
        while len(drawn) < self._num_requests:
            drawn[tuple(chance.sample(indices, self._num_contexts))] = None
        return list(drawn)
