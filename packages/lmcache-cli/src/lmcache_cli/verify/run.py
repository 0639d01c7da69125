"""One prompt after another: computed twice, stored, asked again from the cache, compared; narrowed where it differs.

Computed means: under a salt that nobody has used, which no cache can know. Stored and asked again means: twice under
one more such salt. An answer that the server's chunks did not serve is never called equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lmcache_cli.verify import evidence
from lmcache_cli.verify.compare import CLOSE, DIFFERENT, EQUAL, Comparison, compare, nearest
from lmcache_cli.verify.evidence import Holdings, Served, Witness
from lmcache_cli.verify.greedy import Answer, GreedyEngine, new_salt

DIVERGED = "diverged"
NOT_CACHED = "not_cached"
INCONCLUSIVE = "inconclusive"
VERDICTS = (EQUAL, CLOSE, DIVERGED, NOT_CACHED, INCONCLUSIVE)
COMPARED = (EQUAL, CLOSE, DIVERGED)

TAIL_TOKENS = 8
"""Tokens behind the cached chunks of a shortened prompt, at most: what is computed, so that the chunks matter."""


@dataclass(frozen=True)
class Narrowed:
    """Where a difference begins.

    Attributes:
        chunk: index of the first chunk whose use changes the answer; None where it was not found.
        tier: that held it just before it was used first; to be loaded brings a chunk into L1.
        is_stored_again_bad: whether the same prompt, stored anew under another salt, differs again: then every store or
            load of that chunk is wrong, and not the one stored copy; None where that was not found out.
        reason: why it was not found.
        num_requests: that it took.
    """

    chunk: int | None
    tier: str | None = None
    is_stored_again_bad: bool | None = None
    reason: str | None = None
    num_requests: int = 0


@dataclass(frozen=True)
class Row:
    """What came out for one prompt.

    Attributes:
        verdict: one of VERDICTS.
        reason: of a verdict that is no comparison.
        is_deterministic: whether two computed answers were the same in every token; None where there are no two.
        tiers: by chunk, just before the cached request.
        served: who served that request.
        cached_tokens: of it, as the engine counted.
    """

    num_tokens: int
    verdict: str
    reason: str | None = None
    is_deterministic: bool | None = None
    tiers: Sequence[str | None] = ()
    served: Served | None = None
    cached_tokens: int | None = None
    comparison: Comparison | None = None
    narrowed: Narrowed | None = None
    computed: Sequence[Answer] = field(default=(), repr=False)
    cached: Answer | None = field(default=None, repr=False)


class Verifier:
    """Asks one engine that stores into one server.

    Args:
        tolerance: of log probabilities, see ``compare``.
        resets: whether to empty the engine's own prefix cache before each request that the server shall serve.
    """

    def __init__(
        self,
        engine: GreedyEngine,
        holdings: Holdings,
        witness: Witness,
        model: str,
        max_tokens: int,
        tolerance: float,
        chunk_size: int,
        resets: bool,
    ) -> None:
        self._engine = engine
        self._holdings = holdings
        self._witness = witness
        self._model = model
        self._max_tokens = max_tokens
        self._tolerance = tolerance
        self._chunk_size = chunk_size
        self._resets = resets
        self._num_requests = 0

    def verify(self, tokens: Sequence[int]) -> Row:
        """Whether the engine answers ``tokens`` the same when its server serves them.

        Raises:
            ServerError: one of them does not answer.
        """
        num_tokens = len(tokens)
        if num_tokens < self._chunk_size:
            return Row(num_tokens, NOT_CACHED, f"it is shorter than a chunk ({self._chunk_size} tokens)")
        computed = []
        for _ in range(2):
            answer, served = self._watched(tokens, new_salt())
            if answer.cached_tokens or served.source not in (evidence.NONE, evidence.UNCLEAR):
                return Row(num_tokens, INCONCLUSIVE, _UNSALTED, served=served, cached_tokens=answer.cached_tokens)
            computed.append(answer)
        between = compare(computed[0], computed[1], self._tolerance)
        is_deterministic = between.position is None
        if between.kind == DIFFERENT:
            return Row(num_tokens, INCONCLUSIVE, _UNSTEADY, False, comparison=between, computed=computed)
        salt = new_salt()
        self._ask(tokens, salt)
        held = self._holdings.held(tokens, salt)
        if not any(held):
            return Row(num_tokens, NOT_CACHED, _NOT_HELD, is_deterministic, held, computed=computed)
        tiers, cached, served = self._from_cache(tokens, salt)
        row = Row(
            num_tokens,
            NOT_CACHED,
            _why_not_ours(served),
            is_deterministic,
            tiers,
            served,
            cached.cached_tokens,
            computed=computed,
            cached=cached,
        )
        return row if row.reason is not None else self._compared(row, tokens, salt)

    def _compared(self, row: Row, tokens: Sequence[int], salt: str) -> Row:
        assert row.cached is not None
        comparison = nearest(row.computed, row.cached, self._tolerance)
        narrowed = None
        if comparison.kind == DIFFERENT:
            self._num_requests = 0
            narrowed = self._narrow(tokens, salt, row.tiers)
        verdict = DIVERGED if comparison.kind == DIFFERENT else comparison.kind
        return replace(row, verdict=verdict, comparison=comparison, narrowed=narrowed)

    def _narrow(self, tokens: Sequence[int], salt: str, tiers: Sequence[str | None]) -> Narrowed:
        """Halve the range of chunks until one more of them makes the difference.

        The prompt is cut behind k chunks and a few tokens, and asked from the chunks that lie there under ``salt``, and
        computed.
        """
        good, bad = 0, len(tokens) // self._chunk_size
        is_bad = self._differs(self._cut(tokens, bad), salt)
        if not is_bad:
            reason = _NOT_USED if is_bad is None else _NOT_AGAIN
            return Narrowed(None, reason=reason, num_requests=self._num_requests)
        while bad - good > 1:
            middle = (good + bad) // 2
            is_bad = self._differs(self._cut(tokens, middle), salt)
            if is_bad is None:
                return Narrowed(None, reason=_NOT_USED, num_requests=self._num_requests)
            good, bad = (good, middle) if is_bad else (middle, bad)
        prompt = self._cut(tokens, bad)
        fresh = new_salt()
        self._ask(prompt, fresh)
        self._holdings.held(prompt, fresh)
        return Narrowed(bad - 1, tiers[bad - 1], self._differs(prompt, fresh), None, self._num_requests)

    def _cut(self, tokens: Sequence[int], num_chunks: int) -> Sequence[int]:
        return tokens[: num_chunks * self._chunk_size + min(TAIL_TOKENS, self._chunk_size - 1)]

    def _differs(self, prompt: Sequence[int], salt: str) -> bool | None:
        """Whether ``prompt`` is answered otherwise from what is held under ``salt``; None where that was not used."""
        computed = self._ask(prompt, new_salt())
        _, cached, served = self._from_cache(prompt, salt)
        if _why_not_ours(served) is not None:
            return None
        return compare(computed, cached, self._tolerance).kind == DIFFERENT

    def _from_cache(self, tokens: Sequence[int], salt: str) -> tuple[Sequence[str | None], Answer, Served]:
        """(tiers just before, answer, who served it) of a prompt that the server holds."""
        if self._resets:
            self._engine.reset_prefix_cache()
        tiers = self._holdings.tiers(tokens, salt)
        answer, served = self._watched(tokens, salt)
        return tiers, answer, served

    def _watched(self, tokens: Sequence[int], salt: str) -> tuple[Answer, Served]:
        before = self._witness.counters()
        answer = self._ask(tokens, salt)
        return answer, self._witness.served(before, answer)

    def _ask(self, tokens: Sequence[int], salt: str) -> Answer:
        self._num_requests += 1
        return self._engine.ask(self._model, tokens, self._max_tokens, salt)


_UNSALTED = "the engine took a prompt with a new cache_salt from a cache, so nothing can be computed to compare with"
_UNSTEADY = "two computed answers differ by more than the tolerance: the engine is not deterministic"
_NOT_HELD = "the server holds none of its chunks after it was asked"
_NOT_AGAIN = "asked once more from the cache, the answer was right"
_NOT_USED = "a shortened prompt was not served from the server's chunks"
_REASONS = {
    evidence.ENGINE: "the engine's own prefix cache served it; see --reset-prefix-cache",
    evidence.NONE: "the engine computed it although the server holds its chunks",
    evidence.UNCLEAR: "other requests ran at the same time, so that nobody can say what served it",
}


def _why_not_ours(served: Served) -> str | None:
    """Why an answer does not count as served by the server; None where it does."""
    if served.quarantined:
        chunks = "a chunk" if served.quarantined == 1 else f"{served.quarantined} chunks"
        return f"{chunks} failed the check at use and went out, and the engine computed instead"
    return None if served.is_ours else _REASONS[served.source]
