"""Lookups and claims of the scheduler's half: how much of a prompt is held, what of it vLLM is told, what is loaded.

Never waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass

from lmcache.connectors.session import Prefix, SchedulerSession
from lmcache.connectors.vllm.groups import Groups
from lmcache.connectors.vllm.metadata import Load
from lmcache.connectors.vllm.pins import Turn
from lmcache.connectors.vllm.states import HeldState, StateSearch, state_key
from lmcache.connectors.vllm.tracker import KeyChain, Tracker
from lmcache.transfer.plan import NOT_WRITTEN

LEASE_MARGIN_S = 10.0
"""A lease is taken anew when less than this is left of it at the moment of the claim."""

UNABLE_PAUSE_S = 2.0
"""No claims for this long after a worker could not load: it is about to attach, and if it cannot, claims cost for
nothing."""


@dataclass(frozen=True, slots=True)
class Loading:
    """A load that the workers have been given, and the leases under which it runs."""

    request_id: str
    prefix: Prefix
    state: HeldState | None
    chain: KeyChain


class Claims:
    """Decisions for one engine.

    Args:
        chain_of: the keys of a request; None while there is no server, or when it is bypassed.
        world_size: ranks that each hold a part of a chunk.
    """

    def __init__(
        self,
        session: SchedulerSession,
        groups: Groups,
        world_size: int,
        chain_of: Callable[[Tracker], KeyChain | None],
    ) -> None:
        self._session = session
        self._groups = groups
        self._world_size = world_size
        self._chain_of = chain_of
        self._turn = Turn(groups.are_windowed or groups.have_states)
        self._claims_from = 0.0

    def pause(self) -> None:
        """A worker could not load."""
        self._claims_from = time.monotonic() + UNABLE_PAUSE_S

    def leave_turn(self, request_ids: Container[str]) -> None:
        """These run, or are over."""
        self._turn.leave(request_ids)

    def ask(self, tracker: Tracker, first_chunk: int) -> bool:
        """Send a lookup; False when there is nothing to ask or nobody to ask.

        Args:
            first_chunk: leading chunks that the engine holds itself.
        """
        chain = self._chain_of(tracker)
        if chain is None or tracker.settled_at == tracker.request.num_preemptions:
            return False
        keys = tracker.keys_upto(chain, tracker.request.num_tokens)
        if len(keys) <= first_chunk:
            return False
        tracker.question = self._session.ask(keys, first_chunk, counted=not tracker.asked)
        tracker.asked = tracker.asked or tracker.question is not None
        return tracker.question is not None

    def match(self, tracker: Tracker, local_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond ``local_tokens`` that can be loaded, and whether a load follows; None for "ask again"."""
        request = tracker.request
        if tracker.bypassed or tracker.settled_at == request.num_preemptions or tracker.load_job is not None:
            return 0, False
        leases = [tracker.prefix, tracker.state.prefix if tracker.state else None]
        if any(lease is not None and lease.good_until - time.monotonic() < LEASE_MARGIN_S for lease in leases):
            self._release(tracker)
        if tracker.prefix is None:
            chunk_tokens = tracker.chain.chunk_tokens if tracker.chain else (self._session.chunk_tokens or 1)
            if tracker.question is None and not self.ask(tracker, local_tokens // chunk_tokens):
                return 0, False
            if not self._answered(tracker):
                return None, False
        prefix, chain = tracker.prefix, tracker.chain
        if prefix is None or chain is None:
            tracker.settled_at = request.num_preemptions
            return 0, False
        if time.monotonic() < self._claims_from:
            return 0, False
        usable = self._usable_tokens(tracker, prefix, chain, local_tokens)
        if usable is None:
            return None, False
        if usable <= local_tokens or local_tokens // chain.chunk_tokens < prefix.first_chunk:
            return 0, False
        if not self._turn.is_free(request.request_id):
            return None, False
        tracker.local_tokens = local_tokens
        return usable - local_tokens, True

    def take(self, tracker: Tracker, num_external_tokens: int, job: int) -> tuple[Load, Loading] | None:
        """vLLM has given the request its blocks: what was claimed becomes load ``job``; None where the claim is let
        go, or there is none."""
        prefix, state, chain = tracker.prefix, tracker.state, tracker.chain
        if prefix is None or chain is None or num_external_tokens == 0:
            self._release(tracker)
            return None
        tracker.prefix = tracker.state = None
        tracker.settled_at = tracker.request.num_preemptions
        self._turn.take(tracker.request.request_id)
        loading = Loading(tracker.request.request_id, prefix, state, chain)
        return self._plan(tracker, loading, num_external_tokens, job), loading

    def end(self, loading: Loading, failed: list[int], state_failed: bool) -> None:
        """A load is over; ``failed`` are its chunks whose bytes were not what was stored."""
        self._session.release(loading.prefix, failed)
        if loading.state is not None:
            self._session.release(loading.state.prefix, [0] if state_failed else [])

    def drop(self, tracker: Tracker) -> None:
        """Nobody waits for what this request has asked or claimed."""
        if tracker.question is not None:
            self._session.cancel(tracker.question)
        tracker.question = None
        self._release(tracker)

    def _release(self, tracker: Tracker) -> None:
        if tracker.search is not None:
            tracker.search.cancel()
        for prefix in (tracker.prefix, tracker.state.prefix if tracker.state else None):
            if prefix is not None:
                self._session.release(prefix)
        tracker.prefix = tracker.search = tracker.state = None

    def _answered(self, tracker: Tracker) -> bool:
        question = tracker.question
        if question is not None and self._session.poll(question):
            tracker.question = None
            prefix = tracker.prefix = question.answer
            if prefix and len(prefix.offsets) != (prefix.num_chunks - prefix.first_chunk) * self._world_size:
                self._release(tracker)
        return tracker.question is None

    def _usable_tokens(self, tracker: Tracker, prefix: Prefix, chain: KeyChain, local_tokens: int) -> int | None:
        """Where a claim ends; None while that is not known."""
        # The last token is always computed, since its logits are wanted; its block is loaded whole all the same.
        num_tokens = min(prefix.num_chunks * chain.chunk_tokens, int(tracker.request.num_tokens) - 1)
        if not self._groups.have_states:
            return num_tokens
        if tracker.state is None:
            if tracker.search is None:
                first = max(local_tokens // chain.chunk_tokens, prefix.first_chunk)
                tracker.search = StateSearch(self._session, chain.keys, first, num_tokens // chain.chunk_tokens)
            if not tracker.search.is_over():
                return None
            tracker.state, tracker.search = tracker.search.take(), None
            if tracker.state is None or len(tracker.state.prefix.offsets) != self._world_size:
                tracker.settled_at = tracker.request.num_preemptions
                self._release(tracker)
                return 0
        return tracker.state.num_chunks * chain.chunk_tokens

    def _plan(self, tracker: Tracker, loading: Loading, num_external_tokens: int, job: int) -> Load:
        """Chunks from the one that the engine's own tokens end in. Blocks that the engine computed itself may belong to
        other requests already: their bytes are checked with the rest of the chunk, but never written."""
        prefix, chain, step = loading.prefix, loading.chain, loading.chain.chunk_tokens
        total = tracker.local_tokens + num_external_tokens
        first, stop = tracker.local_tokens // step, -(-total // step)
        blocks: list[int] = []
        for chunk in range(first, stop):
            blocks += self._groups.row(tracker.tables, chunk, step, tracker.local_tokens, total)
        span = slice((first - prefix.first_chunk) * self._world_size, (stop - prefix.first_chunk) * self._world_size)
        return Load(
            job,
            loading.request_id,
            prefix.line.server,
            b"".join(chain.keys[first:stop]),
            tuple(blocks),
            tuple(prefix.offsets[span]),
            tuple(prefix.checksums[span]),
            self._plan_state(tracker, loading, total, job),
        )

    def _plan_state(self, tracker: Tracker, loading: Loading, num_tokens: int, job: int) -> Load | None:
        state = loading.state
        if state is None:
            return None
        row = self._groups.state_row(tracker.tables, num_tokens)
        if num_tokens != state.num_chunks * loading.chain.chunk_tokens:
            row = [NOT_WRITTEN] * len(row)  # not what was claimed: such a load fails, and is computed
        return Load(
            job,
            loading.request_id,
            state.prefix.line.server,
            state_key(loading.chain.keys[state.num_chunks - 1]),
            tuple(row),
            tuple(state.prefix.offsets),
            tuple(state.prefix.checksums),
        )
