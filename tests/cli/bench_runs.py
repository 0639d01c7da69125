"""Runs of the benchmark with figures that can be worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lmcache_cli.bench.base import Failure, Outcome, Pacing, Plan, Request, Run

CONFIG = {
    "workload": "long-doc-qa",
    "engine_url": "http://localhost:8000",
    "model": "m",
    "seed": 42,
    "ldqa_document_length": 100,
}


def outcome(
    name: str,
    sent_s: float,
    text_s: Sequence[float],
    end_s: float,
    *,
    due_s: float | None = None,
    is_first: bool = False,
    prompt_tokens: int | None = 100,
    output_tokens: int | None = None,
    cached_tokens: int | None = None,
    num_attempts: int = 1,
    failure: tuple[str, str] | None = None,
) -> Outcome:
    """One request; it has as many output tokens as arrivals unless said otherwise."""
    tokens = len(text_s) if output_tokens is None and failure is None else output_tokens
    return Outcome(
        Request(name, [{"role": "user", "content": "question"}], 16, "document 1", is_first),
        sent_s if due_s is None else due_s,
        sent_s,
        end_s,
        tuple(text_s),
        "secret answer",
        None if failure else prompt_tokens,
        tokens,
        cached_tokens,
        num_attempts,
        None if failure is None else Failure(*failure),
    )


def run(outcomes: Sequence[Outcome], config: Mapping[str, Any] = CONFIG, **others: Any) -> Run:
    """A run of these requests."""
    others.setdefault("pacing", Pacing(concurrency=2))
    plan = Plan(len(outcomes), 0, 400, 100, 16, [("documents", 1)])
    return Run(config, "m", plan, "2026-11-24T10:00:00+00:00", "tokenize", outcomes=list(outcomes), **others)


def four() -> list[Outcome]:
    """Three that succeed and one that fails, from 1000.0 to 1004.0 s.

    TTFT 1000, 100, 200 ms; TPOT 100, 50, none; e2e 1300, 250, 250 ms; gaps 100, 100, 50, 50 ms.
    """
    return [
        outcome("a", 1000.0, [1001.0, 1001.1, 1001.2], 1001.3, is_first=True),
        outcome("b", 1001.5, [1001.6, 1001.65, 1001.7], 1001.75, cached_tokens=80),
        outcome("c", 1002.0, [1002.2], 1002.25, cached_tokens=40),
        outcome("d", 1003.0, [], 1004.0, failure=("http_503", "HTTP 503 from http://e: <b>busy</b>"), num_attempts=2),
    ]
