"""long-doc-qa: several questions about each of many long documents, which are what is reused."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lmcache_cli.bench.base import Listed, Option, Pacing, Plan, Request, Source, Texts
from lmcache_cli.bench.workloads.common import DOCUMENT_TOKENS_MAX, check_size, user

QUESTIONS = (
    "What is this text about? Answer in one sentence.",
    "Which word occurs most often in the text above?",
    "Summarise the second half of the text.",
    "Which part of the text is the hardest to understand, and why?",
)
QUESTION_TOKENS = 16  # roughly; small beside a document


class LongDocQA:
    """Documents x questions, in random order or document by document in turn."""

    name: ClassVar[str] = "long-doc-qa"
    summary: ClassVar[str] = "Repeated questions about long documents."
    options: ClassVar[tuple[Option, ...]] = (
        Option("ldqa_document_length", int, 10000, "Tokens of a document", 1, DOCUMENT_TOKENS_MAX),
        Option("ldqa_query_per_document", int, 2, "Questions about each document", 1, 10000),
        Option("ldqa_shuffle_policy", str, "random", "Order of the questions", choices=("random", "tile")),
        Option("ldqa_num_inflight_requests", int, 3, "Requests in flight", 1, 4096),
        Option("ldqa_max_output_length", int, 128, "Tokens of an answer, at most", 1, 1_000_000),
    )
    uses_volume: ClassVar[bool] = True
    volume_key: ClassVar[str | None] = "kv_cache_volume"
    pacing_keys: ClassVar[tuple[str, ...]] = ("ldqa_num_inflight_requests",)
    pause_s = 0.0

    def __init__(self, settings: Mapping[str, Any], seed: int, volume_tokens: int | None) -> None:
        self._settings = settings
        self._seed = seed
        self._num_documents = max(1, (volume_tokens or 0) // settings["ldqa_document_length"])
        self._documents: list[str] = []
        plan = self.plan()
        check_size(plan.prompt_tokens or 0, plan.num_requests or 0, "lower --kv-cache-volume")

    def plan(self) -> Plan:
        """Each document is asked about so many times, after a warm-up that sends it once."""
        length, per_document = self._settings["ldqa_document_length"], self._settings["ldqa_query_per_document"]
        num_requests = self._num_documents * per_document
        return Plan(
            num_requests=num_requests,
            num_warmup_requests=self._num_documents,
            prompt_tokens=num_requests * (length + QUESTION_TOKENS),
            distinct_tokens=self._num_documents * length,
            output_tokens_max=self._settings["ldqa_max_output_length"],
            documents=(("documents", self._num_documents),),
        )

    def prepare(self, texts: Texts) -> None:
        """Make the documents."""
        length = self._settings["ldqa_document_length"]
        self._documents = [texts.words(length, "document", index) for index in range(self._num_documents)]

    def warmup(self) -> Sequence[Request]:
        """Each document alone."""
        return [
            Request(f"warmup_doc{index}", user(text), 1, f"document {index}", is_first=True)
            for index, text in enumerate(self._documents)
        ]

    def source(self) -> Source:
        """All questions, in the order of the policy."""
        order = [
            (document, question)
            for question in range(self._settings["ldqa_query_per_document"])
            for document in range(self._num_documents)
        ]
        if self._settings["ldqa_shuffle_policy"] == "random":
            random.Random(repr((self._seed, "order"))).shuffle(order)
        return Listed([self._request(document, question) for document, question in order])

    def pacing(self) -> Pacing:
        """So many in flight."""
        return Pacing(concurrency=self._settings["ldqa_num_inflight_requests"])

    def _request(self, document: int, question: int) -> Request:
        content = f"{self._documents[document]}\n\nQuestion {question}: {QUESTIONS[question % len(QUESTIONS)]}"
        max_tokens = self._settings["ldqa_max_output_length"]
        return Request(f"doc{document}_q{question}", user(content), max_tokens, f"document {document}")
