"""The scheduler's half of the connector: what of a request is held, what is loaded, what is stored. Never waits.

A request goes through: lookup sent on arrival -> asked by vLLM ("ask again" until the answer is there) -> claim, when
the held prefix is longer than what the engine has itself -> blocks allocated -> load ordered -> every rank has
reported -> lease released. Stores follow the tokens: a chunk is ordered once the step of its last token is over; where
vLLM takes blocks from requests that run (sliding windows), in that step, whose forward the copy waits for.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcache.connectors.session import Prefix, SchedulerSession
from lmcache.connectors.vllm.groups import Groups, Tables
from lmcache.connectors.vllm.identity import Bypass
from lmcache.connectors.vllm.metadata import Load, StepMetadata, StepReport, Store
from lmcache.connectors.vllm.pins import Pins, Turn
from lmcache.connectors.vllm.tracker import KeyChain, Tracker
from lmcache.keys import Value, namespace
from lmcache.transfer.plan import NOT_WRITTEN

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

LOOKAHEAD_MAX = 4
"""Lookups ahead of their turn: enough that an answer is there when vLLM asks, few enough that a long queue pins
nothing."""

LEASE_MARGIN_S = 10.0
"""A lease is taken anew when less than this is left of it at the moment of the claim."""

UNABLE_PAUSE_S = 2.0
"""No claims for this long after a worker could not load: it is about to attach, and if it cannot, claims cost for
nothing."""


@dataclass(frozen=True, slots=True)
class _Loading:
    """A load that the workers have been given."""

    request_id: str
    prefix: Prefix
    chain: KeyChain


class SchedulerHalf:
    """Decisions for one engine.

    Args:
        engine_namespace: digest of what all requests share.
        groups: what kinds of block tables a request has.
        world_size: ranks that each hold a part of a chunk.
        num_workers: processes that report each job (more than ``world_size`` where ranks hold the same KV).
    """

    def __init__(
        self,
        session: SchedulerSession,
        engine_namespace: bytes,
        groups: Groups,
        world_size: int,
        num_workers: int,
    ) -> None:
        self._session = session
        self._engine_namespace = engine_namespace
        self._groups = groups
        self._pins = Pins()
        self._turn = Turn(groups.are_windowed)
        self._world_size = world_size
        self._num_workers = num_workers
        self._trackers: dict[str, Tracker] = {}
        self._loading: dict[int, _Loading] = {}
        self._reports: dict[int, int] = {}
        self._failed: dict[int, set[int]] = {}
        self._unable: set[int] = set()
        self._store_owner: dict[int, str] = {}
        self._next = StepMetadata()
        self._last_job = 0
        self._claims_from = 0.0
        self._num_resets = 0

    def bind(self, manager: KVCacheManager) -> None:
        """vLLM's block tables and pool; without them, requests whose tables do not only grow are not cached."""
        self._pins.bind(manager)

    # --- lookup and claim ---------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Send the lookup early, so that its answer is there at the request's turn."""
        tracker = self._tracker(request)
        waiting = sum(1 for other in self._trackers.values() if other.question or other.prefix)
        if waiting < LOOKAHEAD_MAX:
            self._ask(tracker, first_chunk=0)

    def match(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """vLLM's question: tokens beyond ``local_tokens`` that we can load, or None for "ask again"."""
        tracker = self._tracker(request)
        if tracker.bypassed or tracker.settled_at == request.num_preemptions or tracker.load_job is not None:
            return 0, False
        if tracker.prefix is not None and tracker.prefix.good_until - time.monotonic() < LEASE_MARGIN_S:
            self._session.release(tracker.prefix)
            tracker.prefix = None
        if tracker.prefix is None:
            if tracker.question is None and not self._ask(tracker, local_tokens // self._chunk_tokens(tracker)):
                return 0, False
            if not self._answered(tracker):
                return None, False
        prefix, chain = tracker.prefix, tracker.chain
        if prefix is None or chain is None:
            tracker.settled_at = request.num_preemptions
            return 0, False
        if time.monotonic() < self._claims_from:
            return 0, False
        # The last token is always computed, since its logits are wanted; its block is loaded whole all the same.
        usable = min(prefix.num_chunks * chain.chunk_tokens, request.num_tokens - 1)
        if usable <= local_tokens or local_tokens // chain.chunk_tokens < prefix.first_chunk:
            return 0, False
        if not self._turn.is_free(request.request_id):
            return None, False
        tracker.local_tokens = local_tokens
        return usable - local_tokens, True

    def allocated(self, request: Request, tables: Tables, num_external_tokens: int) -> None:
        """vLLM has given the request its blocks: load into them what was claimed, or let the claim go."""
        tracker = self._tracker(request)
        tracker.tables = [list(table) for table in tables]
        prefix, tracker.prefix = tracker.prefix, None
        if prefix is None:
            return
        if num_external_tokens == 0 or tracker.chain is None:
            self._session.release(prefix)
            return
        tracker.settled_at = request.num_preemptions
        tracker.load_job = self._new_job()
        self._turn.take(request.request_id)
        self._loading[tracker.load_job] = _Loading(request.request_id, prefix, tracker.chain)
        self._next.loads.append(self._plan_load(tracker, tracker.chain, prefix, num_external_tokens))

    def _plan_load(self, tracker: Tracker, chain: KeyChain, prefix: Prefix, num_external_tokens: int) -> Load:
        """Chunks from the one that the engine's own tokens end in. Blocks that the engine computed itself may belong to
        other requests already: their bytes are checked with the rest of the chunk, but never written."""
        step = chain.chunk_tokens
        total = tracker.local_tokens + num_external_tokens
        first, stop = tracker.local_tokens // step, -(-total // step)
        blocks: list[int] = []
        for chunk in range(first, stop):
            blocks += self._groups.row(tracker.tables, chunk, step, tracker.local_tokens, total)
        span = slice((first - prefix.first_chunk) * self._world_size, (stop - prefix.first_chunk) * self._world_size)
        assert tracker.load_job is not None
        return Load(
            tracker.load_job,
            tracker.request.request_id,
            prefix.line.server,
            b"".join(chain.keys[first:stop]),
            tuple(blocks),
            tuple(prefix.offsets[span]),
            tuple(prefix.checksums[span]),
        )

    def _ask(self, tracker: Tracker, first_chunk: int) -> bool:
        """Send a lookup; False when there is nothing to ask or nobody to ask."""
        chain = self._chain(tracker)
        if chain is None or tracker.settled_at == tracker.request.num_preemptions:
            return False
        keys = self._extend(tracker, chain, tracker.request.num_tokens)
        if len(keys) <= first_chunk:
            return False
        tracker.question = self._session.ask(keys, first_chunk, counted=not tracker.asked)
        tracker.asked = tracker.asked or tracker.question is not None
        return tracker.question is not None

    def _answered(self, tracker: Tracker) -> bool:
        question = tracker.question
        if question is not None and self._session.poll(question):
            tracker.question = None
            prefix = tracker.prefix = question.answer
            if prefix and len(prefix.offsets) != (prefix.num_chunks - prefix.first_chunk) * self._world_size:
                self._session.release(prefix)
                tracker.prefix = None
        return tracker.question is None

    # --- store --------------------------------------------------------------------------------------------------------

    def build(self, output: SchedulerOutput) -> StepMetadata:
        """The orders of this step; call once a step."""
        self._session.pump()
        for request_id in getattr(output, "preempted_req_ids", None) or ():
            self._preempted(request_id)
        self._follow_blocks(output)
        self._turn.leave(output.num_scheduled_tokens)
        for request_id, num_scheduled in output.num_scheduled_tokens.items():
            tracker = self._trackers.get(request_id)
            if tracker is None or tracker.bypassed:
                continue
            after = tracker.known_tokens_after(num_scheduled)
            self._order_stores(tracker, after if self._groups.are_windowed else tracker.confirmed_tokens)
        step, self._next = self._next, StepMetadata()
        return step

    def finished(self, request: Request, tables: Tables) -> bool:
        """The request is over; True when its blocks must stay until its stores are (reported as sent exactly once)."""
        tracker = self._trackers.pop(request.request_id, None)
        self._turn.leave((request.request_id,))
        if tracker is None:
            return False
        if tracker.question is not None:
            self._session.cancel(tracker.question)
        if tracker.prefix is not None:
            self._session.release(tracker.prefix)
        if tracker.load_job is not None:
            # The load still runs: vLLM keeps the blocks until it is reported received, and only that may be reported.
            return False
        tracker.tables = [list(table) for table in tables]
        if not tracker.bypassed:
            self._order_stores(tracker, tracker.confirmed_tokens, is_last=True)
        if not tracker.store_jobs:
            return False
        self._next.closing.append(request.request_id)
        return True

    def _order_stores(self, tracker: Tracker, num_tokens: int, is_last: bool = False) -> None:
        """Order the chunks among the first ``num_tokens`` tokens that have not been ordered yet.

        Args:
            is_last: the request is over, and its tables are those that vLLM has just handed over.
        """
        chain = self._chain(tracker)
        if chain is None or tracker.load_job is not None or not tracker.tables:
            return
        step = chain.chunk_tokens
        if num_tokens // step <= tracker.num_stored:
            return
        if not self._groups.are_plain and not is_last:
            tracker.tables = self._pins.tables(tracker.request.request_id)
        stop = min(num_tokens // step, self._groups.num_whole_chunks(tracker.tables, step))
        if stop <= tracker.num_stored:
            return
        keys = self._extend(tracker, chain, stop * step)
        if tracker.bypassed:
            return
        # From the first chunk on: what is held is only touched, so that a prefix never grows older than what follows it
        # (evicted first, it would leave the rest unreachable), and what was lost meanwhile is stored again. Not so
        # where vLLM has taken the blocks of the first chunks.
        first = tracker.num_stored if self._groups.are_windowed else 0
        rows = {chunk: self._groups.row(tracker.tables, chunk, step) for chunk in range(first, stop)}
        whole = [chunk for chunk, row in rows.items() if NOT_WRITTEN not in row]
        tracker.num_stored = stop
        if whole:
            self._order_store(tracker, chain, b"".join(keys[chunk] for chunk in whole), [rows[i] for i in whole])

    def _order_store(self, tracker: Tracker, chain: KeyChain, keys: bytes, rows: list[list[int]]) -> None:
        job = self._new_job()
        tracker.store_jobs.add(job)
        self._store_owner[job] = tracker.request.request_id
        # Blocks that slide out of a window while the copy runs would be another request's at once.
        self._pins.pin(job, [b for row in rows for b in self._groups.windowed_blocks(row, chain.chunk_tokens)])
        blocks = tuple(block for row in rows for block in row)
        self._next.stores.append(Store(job, tracker.request.request_id, keys, blocks, chain.salt, chain.namespace))

    def _preempted(self, request_id: str) -> None:
        """vLLM has taken the blocks back: copies that still run may read what is no longer theirs."""
        tracker = self._trackers.get(request_id)
        if tracker is not None:
            self._next.marked.extend(tracker.store_jobs)
            tracker.num_stored = 0
            tracker.tables = []

    def _follow_blocks(self, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            tracker = self._trackers.get(new.req_id)
            if tracker is not None:
                tracker.tables = [list(table) for table in new.block_ids]
        cached = output.scheduled_cached_reqs
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            tracker = self._trackers.get(request_id)
            if tracker is None or new_blocks is None:
                continue
            if request_id in cached.resumed_req_ids:
                tracker.tables = [list(table) for table in new_blocks]
            elif tracker.tables:
                for table, more in zip(tracker.tables, new_blocks, strict=True):
                    table.extend(more)

    # --- reports ------------------------------------------------------------------------------------------------------

    def take_report(self, report: StepReport) -> None:
        """What the workers have finished: a job is over when every one of them has said so."""
        if report.unable:
            self._unable |= report.unable
            self._claims_from = time.monotonic() + UNABLE_PAUSE_S
        for job, chunks in report.failed.items():
            self._failed.setdefault(job, set()).update(chunks)
        for job, count in report.ended.items():
            self._reports[job] = self._reports.get(job, 0) + count
            if self._reports[job] >= self._num_workers:
                del self._reports[job]
                self._job_over(job)

    def _job_over(self, job: int) -> None:
        loading = self._loading.pop(job, None)
        failed = sorted(self._failed.pop(job, ()))
        if loading is not None:
            self._session.release(loading.prefix, failed)
            tracker = self._trackers.get(loading.request_id)
            complete = not failed and job not in self._unable
            self._unable.discard(job)
            if tracker is not None and tracker.load_job == job:
                tracker.load_job = None
                if complete and tracker.chain is loading.chain:
                    # Just looked up and touched: nothing of it needs storing again.
                    tracker.num_stored = max(tracker.num_stored, loading.prefix.num_chunks)
            return
        self._pins.unpin(job)
        tracker = self._trackers.get(self._store_owner.pop(job, ""))
        if tracker is not None:
            tracker.store_jobs.discard(job)

    # --- the rest -----------------------------------------------------------------------------------------------------

    def reset(self) -> bytes:
        """vLLM was told that what is cached is no longer true of its weights: from now on this engine is another, of
        the namespace returned."""
        self._num_resets += 1
        again: dict[str, Value] = {"before": self._engine_namespace, "reset": (self._num_resets, time.time_ns())}
        self._engine_namespace = namespace(again)
        for tracker in self._trackers.values():
            tracker.chain = None
            tracker.num_stored = 0
            if tracker.prefix is not None:
                self._session.release(tracker.prefix)
            if tracker.question is not None:
                self._session.cancel(tracker.question)
            tracker.prefix = tracker.question = None
        return self._engine_namespace

    def register_again(self) -> None:
        """Tell the server of the namespace that ``reset`` returned."""
        self._session.register_again()

    @property
    def waits_for_stores(self) -> bool:
        """Whether vLLM gets blocks back soon, when stores that run are over."""
        return self._pins.are_held

    def close(self) -> None:
        """Detach."""
        self._session.close()

    def _tracker(self, request: Request) -> Tracker:
        tracker = self._trackers.get(request.request_id)
        if tracker is None or tracker.request is not request:
            tracker = self._trackers[request.request_id] = Tracker(request)
            # A resumable request's tokens are rewritten while it runs; a pooling request has no second use.
            tracker.bypassed = bool(getattr(request, "resumable", False)) or not self._can_follow
        return tracker

    @property
    def _can_follow(self) -> bool:
        """Whether we can know the tables of a request at any time."""
        return self._groups.are_plain or self._pins.are_bound

    def _chain(self, tracker: Tracker) -> KeyChain | None:
        """The request's keys under the server's chunk size; None while there is no server, or when it is bypassed."""
        chunk_tokens = self._session.chunk_tokens
        if tracker.bypassed or chunk_tokens is None:
            return None
        if tracker.chain is None or tracker.chain.chunk_tokens != chunk_tokens:
            try:
                tracker.chain = KeyChain(tracker.request, self._engine_namespace, chunk_tokens)
            except Bypass as error:
                self._bypass(tracker, error)
                return None
            tracker.num_stored = 0
        return tracker.chain

    def _extend(self, tracker: Tracker, chain: KeyChain, num_tokens: int) -> list[bytes]:
        try:
            return chain.upto(num_tokens)
        except (Bypass, OverflowError) as error:
            self._bypass(tracker, error)
            return []

    def _bypass(self, tracker: Tracker, error: Exception) -> None:
        logger.warning("request %s is not cached: %s", tracker.request.request_id, error)
        tracker.bypassed = True

    def _chunk_tokens(self, tracker: Tracker) -> int:
        return tracker.chain.chunk_tokens if tracker.chain else (self._session.chunk_tokens or 1)

    def _new_job(self) -> int:
        self._last_job += 1
        return self._last_job
