"""Loads that one client of a KV cache server can be, whoever's client it is: used in our processes and in upstream's.

Only the standard library: upstream_agent.py imports this under another Python. A client's own calls are timed by the
client; what is around them (choosing the next prompt) is the same code for both.
"""

from __future__ import annotations

import random
import time
from typing import Any, Protocol

RECENT_PROMPTS = 64
_TAIL = random.Random(0).choices(range(128_000), k=1 << 17)


def tokens_of(seed: int, num_tokens: int) -> list[int]:
    """The prompt of a seed: no two seeds share a prefix."""
    return [seed, *_TAIL[: num_tokens - 1]]


class Client(Protocol):
    """What a load asks of a client; times are in seconds, of the call itself."""

    def find(self, tokens: list[int]) -> tuple[float, int, Any]:
        """Time, chunks that are held, and what pins them until ``load`` or ``let_go``."""

    def let_go(self, tokens: list[int], num_chunks: int, pin: Any) -> None:
        """End what pins a prefix that is not loaded."""

    def load(self, tokens: list[int], pin: Any) -> tuple[float, bool]:
        """Time, and whether all of a held prompt has been copied into the client's blocks."""

    def keep(self, tokens: list[int]) -> tuple[float, bool]:
        """Time until a store is acknowledged, and whether the ack says that it was done."""


def _wait_until(start_at: float) -> None:
    time.sleep(max(0.0, start_at - time.monotonic()))


def run(
    client: Client, start_at: float, seconds: float, num_tokens: int, chunk_tokens: int, first_seed: int
) -> dict[str, Any]:
    """Requests one after another, as an engine sends them: every second prompt is new (a lookup that misses, then a
    store), every other is one of the last ``RECENT_PROMPTS`` of this client (a lookup that hits, then a retrieve; if
    it has been evicted, a store).

    Args:
        start_at: on the monotonic clock, which all processes of a machine share.

    Returns:
        ``times`` in seconds of each "lookup", "store", "retrieve"; ``elapsed_s``, ``refused`` stores, ``failed`` loads.
    """
    choice, recent, next_seed = random.Random(first_seed), list[int](), first_seed
    times: dict[str, list[float]] = {"lookup": [], "store": [], "retrieve": []}
    refused = failed = 0
    _wait_until(start_at)
    while time.monotonic() < start_at + seconds:
        is_new = not recent or choice.random() < 0.5
        seed = next_seed if is_new else choice.choice(recent)
        tokens = tokens_of(seed, num_tokens)
        spent_s, num_chunks, pin = client.find(tokens)
        times["lookup"].append(spent_s)
        if num_chunks * chunk_tokens == num_tokens:
            spent_s, ok = client.load(tokens, pin)
            times["retrieve"].append(spent_s)
            failed += not ok
            continue
        client.let_go(tokens, num_chunks, pin)
        spent_s, ok = client.keep(tokens)
        times["store"].append(spent_s)
        refused += not ok
        if is_new:
            next_seed += 1
            recent = [*recent[-RECENT_PROMPTS + 1 :], seed]
    return {"times": times, "elapsed_s": time.monotonic() - start_at, "refused": refused, "failed": failed}


def store_on(
    client: Client, start_at: float, seconds: float, num_tokens: int, first_seed: int, looks_behind: int | None
) -> dict[str, Any]:
    """Store new prompts as fast as acks come, until the time is over.

    Args:
        looks_behind: after each ack, look up the prompt that was acknowledged so many acks before (0: this one); None:
            none is looked up. Lookups are not in ``storing_s``.

    Returns:
        ``acked`` and ``refused`` prompts, ``looked`` of them and ``found_chunks`` of these, ``storing_s``.
    """
    acked, refused, looked, found_chunks = list[int](), 0, 0, 0
    storing_s = 0.0
    _wait_until(start_at)
    while time.monotonic() < start_at + seconds:
        seed = first_seed + len(acked) + refused
        spent_s, ok = client.keep(tokens_of(seed, num_tokens))
        storing_s += spent_s
        if not ok:
            refused += 1
            continue
        acked.append(seed)
        if looks_behind is not None and len(acked) > looks_behind:
            tokens = tokens_of(acked[-1 - looks_behind], num_tokens)
            _, num_chunks, pin = client.find(tokens)
            client.let_go(tokens, num_chunks, pin)
            looked, found_chunks = looked + 1, found_chunks + num_chunks
    counts = {"acked": len(acked), "refused": refused, "looked": looked, "found_chunks": found_chunks}
    return {**counts, "storing_s": storing_s}


def look_on(
    client: Client, start_at: float, seconds: float, num_tokens: int, seed: int, pause_s: float
) -> dict[str, Any]:
    """Store one prompt, then look it up again and again, with a pause in between, until the time is over: ``times`` of
    the lookups, and the chunks that each found (``hits``)."""
    tokens = tokens_of(seed, num_tokens)
    times, hits = list[float](), list[int]()
    client.keep(tokens)
    _wait_until(start_at)
    while time.monotonic() < start_at + seconds:
        spent_s, num_chunks, pin = client.find(tokens)
        times.append(spent_s)
        hits.append(num_chunks)
        client.let_go(tokens, num_chunks, pin)
        time.sleep(pause_s)
    return {"times": times, "hits": hits}
