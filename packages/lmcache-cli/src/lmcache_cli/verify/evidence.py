"""Who served a request from a cache: what the engine says in its usage and metrics, and the server in its counters.

The server's counters alone are no proof: an engine asks it about every prompt and is granted a lease also where its own
prefix cache then serves. Engines that count hits of the two apart (vLLM: `vllm:prefix_cache_hits`,
`vllm:external_prefix_cache_hits`) settle it; of others only the usage and the server's counters are known.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lmcache_cli import api, prometheus
from lmcache_cli.client import CacheServer
from lmcache_cli.errors import BadAnswer, ServerError
from lmcache_cli.verify.greedy import Answer, GreedyEngine

LMCACHE = "lmcache"
ENGINE = "engine"
BOTH = "both"
NONE = "none"
UNCLEAR = "unclear"

METRICS_S = 2.0
"""How long counters may lag behind an answer."""

HELD_S = 10.0
"""How long storing may take after the answer that it belongs to."""

_POLL_S = 0.05
_OWN = "vllm:prefix_cache_hits_total"
_EXTERNAL = "vllm:external_prefix_cache_hits_total"
_SERVER = "lmcache_mp_{}_total"


@dataclass(frozen=True)
class Counters:
    """What both sides have counted until now; None: that side does not count it."""

    own_hits: float | None
    external_hits: float | None
    lookups: float
    hit_tokens: float
    retrieves: float
    quarantined: float


@dataclass(frozen=True)
class Served:
    """Where one answer's prompt came from.

    Attributes:
        source: LMCACHE, ENGINE (its own prefix cache), BOTH, NONE (computed), or UNCLEAR (other requests ran at the
            same time, and the counters are of all of them).
        told_by: "engine metrics" | "server counters" | "usage".
        quarantined: chunks that the server took out meanwhile because their bytes failed the check.
        lmcache_tokens: tokens that came from the server; None where nobody tells.
    """

    source: str
    told_by: str
    quarantined: int
    lmcache_tokens: int | None

    @property
    def is_ours(self) -> bool:
        """Whether the server's chunks were used."""
        return self.source in (LMCACHE, BOTH)


class Holdings:
    """Asks the server what it holds. ``url`` is for messages."""

    def __init__(self, server: CacheServer, url: str) -> None:
        self._server = server
        self._url = url

    def chunk_size(self) -> int:
        """Tokens of a chunk of the server."""
        return self._look_up([0], "")[0]

    def tiers(self, tokens: Sequence[int], salt: str) -> list[str | None]:
        """For each whole chunk of ``tokens`` the tier that holds it under ``salt``; of several engines' chunks those of
        the engine that has most."""
        chunk_size, models = self._look_up(tokens, salt)
        num_chunks = len(tokens) // chunk_size
        lists = [[chunk.tier for chunk in model.chunks[:num_chunks]] for model in models]
        most = max(lists, key=lambda tiers: sum(tier is not None for tier in tiers), default=[])
        return most + [None] * (num_chunks - len(most))

    def held(self, tokens: Sequence[int], salt: str) -> list[str | None]:
        """As ``tiers``, once all chunks are held, or after ``HELD_S``: engines store after they have answered."""
        deadline = time.monotonic() + HELD_S
        while None in (found := self.tiers(tokens, salt)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return found

    def _look_up(self, tokens: Sequence[int], salt: str) -> tuple[int, list[api.ModelPrefix]]:
        reply = self._server.lookup(api.LookupRequest(list(tokens), None, salt))
        if reply.chunk_size is None or reply.chunk_size < 1:
            raise BadAnswer(f"what {self._url}{api.PATH_LOOKUP} answers is no look-up")
        return reply.chunk_size, reply.models


class Witness:
    """Reads the counters of both sides."""

    def __init__(self, engine: GreedyEngine, server: CacheServer) -> None:
        self._engine = engine
        self._server = server

    def counters(self) -> Counters:
        """Everything counted until now.

        Raises:
            ServerError: the server's counters cannot be read; an engine without metrics is no error.
        """
        try:
            engine = _sums(self._engine.metrics())
        except ServerError:
            engine = {}
        server = _sums(self._server.metrics())
        names = ("lookups", "lookup_hit_tokens", "retrieves", "quarantined_chunks")
        own_hits = engine.get(_OWN, 0.0) if _EXTERNAL in engine else None
        return Counters(own_hits, engine.get(_EXTERNAL), *(server.get(_SERVER.format(name), 0.0) for name in names))

    def served(self, before: Counters, answer: Answer) -> Served:
        """Where the prompt of ``answer`` came from; ``before`` was read just before it was asked."""
        deadline = time.monotonic() + METRICS_S
        while True:
            after = self.counters()
            found = judge(before, after, answer)
            is_due = bool(answer.cached_tokens) or (
                answer.cached_tokens is None and after.hit_tokens > before.hit_tokens
            )
            if found.source != NONE or not is_due or time.monotonic() > deadline:
                return found
            time.sleep(_POLL_S)


def judge(before: Counters, after: Counters, answer: Answer) -> Served:
    """What the difference of two readings says about the one answer between them."""
    quarantined = int(after.quarantined - before.quarantined)
    cached = answer.cached_tokens
    is_alone = after.lookups - before.lookups <= 1
    if cached == 0:
        return Served(NONE, "usage", quarantined, 0)
    if before.external_hits is None or before.own_hits is None or after.external_hits is None or after.own_hits is None:
        hits = after.hit_tokens - before.hit_tokens
        if hits <= 0 or after.retrieves <= before.retrieves:
            return Served(ENGINE if cached else NONE, "server counters", quarantined, 0)
        return Served(LMCACHE if cached or is_alone else UNCLEAR, "server counters", quarantined, cached)
    external, own = after.external_hits - before.external_hits, after.own_hits - before.own_hits
    if not external and not own:
        source = NONE
    elif cached is None and not is_alone:
        source = UNCLEAR
    elif not own:
        source = LMCACHE
    elif not external:
        source = ENGINE
    else:
        source = BOTH if is_alone else UNCLEAR
    ours = {LMCACHE: cached if cached is not None else int(external), BOTH: int(external), UNCLEAR: None}
    return Served(source, "engine metrics", quarantined, ours.get(source, 0))


def _sums(text: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, _, value in prometheus.samples(text):
        sums[name] = sums.get(name, 0.0) + value
    return sums
