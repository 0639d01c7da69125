"""One vLLM request as the cache sees it: its chain of keys, what is looked up, what is stored, which blocks it has."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from lmcache.connectors.session import Prefix, Question
from lmcache.connectors.vllm.identity import Bypass, request_extras, request_fields
from lmcache.connectors.vllm.states import HeldState, StateSearch
from lmcache.keys import NAMESPACE_PREFIX_BYTES, extend, request_namespace
from lmcache.transfer._native import pack_tokens

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


class KeyChain:
    """Keys of a request's whole chunks, computed once and extended as tokens are generated.

    Raises (also from ``upto``):
        Bypass: the request has no stable identity.
        OverflowError: a token id that is none.
    """

    def __init__(self, request: Request, engine_namespace: bytes, chunk_tokens: int) -> None:
        self._request = request
        self.chunk_tokens = chunk_tokens
        salt, fields = request.cache_salt or "", request_fields(request)
        self._parent = request_namespace(engine_namespace, salt, fields, chunk_tokens)
        self.salt = salt
        self.namespace = self._parent[:NAMESPACE_PREFIX_BYTES]
        self._plain = not (request.mm_features or request.lora_request or request.prompt_embeds is not None)
        self._feature = 0
        self.keys: list[bytes] = []

    def upto(self, num_tokens: int) -> list[bytes]:
        """The chain extended to the whole chunks among the first ``num_tokens`` tokens (never shortened)."""
        start, stop = len(self.keys), num_tokens // self.chunk_tokens
        if stop > start:
            step = self.chunk_tokens
            tokens = self._request.all_token_ids[start * step : stop * step]
            extras: list[bytes] = []
            if not self._plain:
                for chunk in range(start, stop):
                    extra, self._feature = request_extras(
                        self._request, chunk * step, (chunk + 1) * step, self._feature
                    )
                    extras.append(extra)
            self.keys += extend(
                self.keys[-1] if self.keys else self._parent,
                pack_tokens(tokens if isinstance(tokens, list) else list(tokens)),
                step,
                extras,
            )
        return self.keys


class Tracker:
    """State of one request on the scheduler's side. All counts are of chunks unless named otherwise."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.chain: KeyChain | None = None
        self.bypassed = False
        self.tables: list[list[int]] = []  # block ids, one table a group; empty while vLLM has given it none
        self.num_stored = 0  # given to the workers, whatever becomes of it
        self.store_jobs: set[int] = set()  # not reported by all ranks yet
        self.state_jobs: set[int] = set()  # the same of recurrent states, whose blocks nobody can take meanwhile
        self.question: Question | None = None
        self.prefix: Prefix | None = None  # claimed or claimable, not yet loading
        self.search: StateSearch | None = None
        self.state: HeldState | None = None  # where a claim on ``prefix`` ends, in a model with recurrent layers
        self.local_tokens = 0  # computed by the engine itself when the claim was made
        self.load_job: int | None = None
        self.asked = False  # a lookup has been counted for this request
        self.settled_at: int | None = (
            None  # num_preemptions at which the cache had its say; asked again only after one more
        )

    @property
    def confirmed_tokens(self) -> int:
        """Tokens whose KV is final: computed by a step that is over, and accepted (drafts of speculation are not
        yet)."""
        in_flight = int(getattr(self.request, "num_in_flight_tokens", 0))
        return min(int(self.request.num_computed_tokens) - in_flight, int(self.request.num_tokens))

    def known_tokens_after(self, num_scheduled: int) -> int:
        """Tokens of the request whose KV is final once a step that computes ``num_scheduled`` tokens is over. Drafts
        are not among a request's tokens until they are accepted."""
        return min(int(self.request.num_computed_tokens) + num_scheduled, int(self.request.num_tokens))

    def chain_for(self, engine_namespace: bytes, chunk_tokens: int | None) -> KeyChain | None:
        """The request's keys under the server's chunk size; None while there is no server, or when it is bypassed."""
        if self.bypassed or chunk_tokens is None:
            return None
        if self.chain is None or self.chain.chunk_tokens != chunk_tokens:
            try:
                self.chain = KeyChain(self.request, engine_namespace, chunk_tokens)
            except Bypass as error:
                self._bypass(error)
                return None
            self.num_stored = 0
        return self.chain

    def keys_upto(self, chain: KeyChain, num_tokens: int) -> list[bytes]:
        """The chain's keys of the whole chunks among the first ``num_tokens`` tokens, or more; none when the request
        turns out to have no stable identity."""
        try:
            return chain.upto(num_tokens)
        except (Bypass, OverflowError) as error:
            self._bypass(error)
            return []

    def _bypass(self, error: Exception) -> None:
        logger.warning("request %s is not cached: %s", self.request.request_id, error)
        self.bypassed = True
