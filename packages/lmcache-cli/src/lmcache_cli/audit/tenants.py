"""The checks of one tenant against another, each by what a live server and its engine really do."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmcache_cli import api
from lmcache_cli.client import CacheServer
from lmcache_cli.errors import HttpFailure
from lmcache_cli.verify import evidence
from lmcache_cli.verify.evidence import Holdings, Witness
from lmcache_cli.verify.greedy import Answer, GreedyEngine, new_salt

SAME_SALT = "same_salt_hits"
OTHER_SALT = "other_salt_misses"
EVICTION = "other_salt_cannot_evict"
TIMING = "timing_not_separable"
NAMES = (SAME_SALT, OTHER_SALT, EVICTION, TIMING)

PASS = "pass"
FAIL = "fail"
NOT_RUN = "not_run"
INCONCLUSIVE = "inconclusive"

LIMIT_CHUNKS = 2.5
FLOOD_PROMPTS = 5
FLOOD_CHUNKS = 2
"""Of each prompt of the flooding tenant: together four times what its limit lets it keep."""

_POLL_S = 0.05


@dataclass(frozen=True)
class Check:
    """One check: ``result`` is PASS, FAIL, NOT_RUN or INCONCLUSIVE; ``detail`` says why in one sentence."""

    name: str
    result: str
    detail: str
    figures: Mapping[str, Any] = field(default_factory=dict)


class Prompts:
    """Prompts that nobody has sent: random token ids out of an engine's own words."""

    def __init__(self, engine: GreedyEngine, model: str) -> None:
        from lmcache_cli.bench.texts import word_list

        self._random = random.Random(secrets.randbits(128))
        self._ids = engine.tokenize(model, " ".join(self._random.sample(word_list(), k=200))).tokens

    def new(self, num_tokens: int) -> list[int]:
        """So many token ids."""
        return self._random.choices(self._ids, k=num_tokens)

    def shuffled(self, items: Sequence[str]) -> list[str]:
        """``items`` in random order."""
        return self._random.sample(items, k=len(items))


class Tenants:
    """Tenants of random names, who ask one engine that stores into one server.

    Args:
        num_tokens: of a prompt; at least a chunk.
    """

    def __init__(
        self,
        engine: GreedyEngine,
        server: CacheServer,
        holdings: Holdings,
        model: str,
        chunk_size: int,
        num_tokens: int,
    ) -> None:
        self._engine = engine
        self._server = server
        self._holdings = holdings
        self._witness = Witness(engine, server)
        self._model = model
        self._chunk_size = chunk_size
        self._num_tokens = num_tokens
        self._prompts = Prompts(engine, model)
        self._salt = new_salt()
        self._prompt = self._prompts.new(num_tokens)

    def same_salt(self) -> Check:
        """A tenant who asks again is served from the cache; without that the other checks would prove nothing."""
        self.ask(self._prompt, self._salt)
        tiers = self._holdings.held(self._prompt, self._salt)
        if not all(tiers):
            missing = tiers.count(None)
            return Check(
                SAME_SALT, FAIL, f"the server does not hold {missing} of {len(tiers)} chunks of a stored prompt"
            )
        answer, source = self._watched(self._prompt, self._salt)
        figures = {"cached_tokens": answer.cached_tokens, "source": source}
        if source == evidence.UNCLEAR and not answer.cached_tokens:
            return Check(SAME_SALT, INCONCLUSIVE, "other requests ran at the same time", figures)
        if source == evidence.NONE:
            return Check(
                SAME_SALT, FAIL, "a prompt that the server holds was computed again for its own tenant", figures
            )
        return Check(SAME_SALT, PASS, f"a prompt asked again was served from a cache ({source})", figures)

    def other_salt(self) -> Check:
        """Tenants with another salt, or none, or one that looks alike, find nothing."""
        found = look_up_others(self._holdings, self._prompt, self._salt)
        if found.result == FAIL:
            return found
        unclear = 0
        for salt in (new_salt(), None):
            answer, source = self._watched(self._prompt, salt)
            whose = "without a salt" if salt is None else "with another salt"
            if answer.cached_tokens or source in (evidence.LMCACHE, evidence.ENGINE, evidence.BOTH):
                return Check(OTHER_SALT, FAIL, f"a tenant {whose} was served from the first one's cache ({source})")
            unclear += source == evidence.UNCLEAR
        if unclear:
            return Check(OTHER_SALT, INCONCLUSIVE, "other requests ran at the same time")
        return Check(OTHER_SALT, PASS, f"{found.detail}; two tenants who asked for it were not served", found.figures)

    def eviction(self) -> Check:
        """A tenant who stores four times its limit loses its own chunks, and no other's."""
        flooder = new_salt()
        try:
            limit_gb = self._limit_gb()
            if limit_gb is None:
                return Check(EVICTION, NOT_RUN, "the server does not tell how many bytes a tenant takes in L1")
            before = self._server.quota(flooder)
            self._server.set_quota(flooder, api.QuotaLimit(limit_gb))
        except HttpFailure as failure:
            return Check(EVICTION, NOT_RUN, f"no limit can be set: {failure}")
        try:
            return self._flood(flooder, limit_gb)
        finally:
            if before.exists and before.limit_gb is not None:
                self._server.set_quota(flooder, api.QuotaLimit(before.limit_gb))
            else:
                self._server.delete_quota(flooder)

    def _flood(self, flooder: str, limit_gb: float) -> Check:
        held_before = [tier is not None for tier in self._holdings.tiers(self._prompt, self._salt)]
        worst_gb = 0.0
        for _ in range(FLOOD_PROMPTS):
            prompt = self._prompts.new(FLOOD_CHUNKS * self._chunk_size)
            self.ask(prompt, flooder)
            self._until_stored(prompt, flooder)
            worst_gb = max(worst_gb, self._server.quota(flooder).current_usage_gb or 0.0)
        held_after = [tier is not None for tier in self._holdings.tiers(self._prompt, self._salt)]
        lost = sum(before and not after for before, after in zip(held_before, held_after, strict=True))
        stored = FLOOD_PROMPTS * FLOOD_CHUNKS
        figures = {"limit_gb": limit_gb, "usage_max_gb": worst_gb, "chunks_asked": stored, "chunks_lost": lost}
        if not all(held_before):
            return Check(EVICTION, INCONCLUSIVE, "the other tenant's chunks were gone before", figures)
        if not worst_gb:
            return Check(EVICTION, INCONCLUSIVE, "the flooding tenant stored nothing", figures)
        if worst_gb > limit_gb:
            many = f"{worst_gb / limit_gb:.1f} times"
            return Check(EVICTION, FAIL, f"a tenant with a limit took {many} what it may have", figures)
        if lost:
            return Check(EVICTION, FAIL, f"a tenant at its limit evicted {lost} of another's chunks", figures)
        detail = f"a tenant stored {stored} chunks with room for {int(LIMIT_CHUNKS)}; the other lost none"
        return Check(EVICTION, PASS, detail, figures)

    def _limit_gb(self) -> float | None:
        used_gb = self._server.quota(self._salt).current_usage_gb
        num_chunks = sum(tier == "l1" for tier in self._holdings.tiers(self._prompt, self._salt))
        return LIMIT_CHUNKS * used_gb / num_chunks if used_gb and num_chunks else None

    def _until_stored(self, prompt: Sequence[int], salt: str) -> None:
        """Wait for the first chunk of a tenant whose limit may take the others away again."""
        deadline = time.monotonic() + evidence.HELD_S
        while not any(self._holdings.tiers(prompt, salt)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def ask(self, prompt: Sequence[int], salt: str | None) -> Answer:
        """One token of an answer to ``prompt``."""
        return self._engine.ask(self._model, prompt, 1, salt)

    def stored(self, salt: str) -> list[int]:
        """A new prompt that the server holds under ``salt``."""
        prompt = self._prompts.new(self._num_tokens)
        self.ask(prompt, salt)
        self._holdings.held(prompt, salt)
        return prompt

    def unseen(self) -> list[int]:
        """A new prompt that nobody has asked."""
        return self._prompts.new(self._num_tokens)

    def shuffled(self, items: Sequence[str]) -> list[str]:
        """``items`` in random order."""
        return self._prompts.shuffled(items)

    def _watched(self, prompt: Sequence[int], salt: str | None) -> tuple[Answer, str]:
        before = self._witness.counters()
        answer = self.ask(prompt, salt)
        return answer, self._witness.served(before, answer).source


def look_up_same(holdings: Holdings, tokens: Sequence[int], salt: str) -> Check:
    """Whether a server holds ``tokens`` under ``salt``, by look-up alone."""
    tiers = holdings.tiers(tokens, salt)
    held = sum(tier is not None for tier in tiers)
    figures = {"chunks": len(tiers), "chunks_held": held}
    if not held:
        detail = "the server holds no chunk of --token-ids under --cache-salt, so that nothing can be compared"
        return Check(SAME_SALT, FAIL, detail, figures)
    return Check(SAME_SALT, PASS, f"{held} of {len(tiers)} chunks are held under the salt", figures)


def look_up_others(holdings: Holdings, tokens: Sequence[int], salt: str) -> Check:
    """Whether look-ups with other salts, and with such that look alike, find ``tokens``."""
    others = similar_salts(salt)
    for other in others:
        held = sum(tier is not None for tier in holdings.tiers(tokens, other))
        if held:
            return Check(OTHER_SALT, FAIL, f"a look-up with another salt finds {held} chunks", {"salts": len(others)})
    return Check(OTHER_SALT, PASS, f"look-ups with {len(others)} other salts find nothing", {"salts": len(others)})


def similar_salts(salt: str) -> list[str]:
    """Salts that only a careless comparison takes for ``salt``: cut, padded, in other case; a new one; and none."""
    alike = [
        salt[:-1],
        f"{salt} ",
        f" {salt}",
        f"{salt}\0",
        f"{salt}\n",
        salt.upper(),
        salt.lower(),
        f"{salt}/",
        "_default",
    ]
    return [other for other in dict.fromkeys([new_salt(), "", *alike]) if other != salt]
