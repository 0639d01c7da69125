"""The scheduler's half of the connector: what of a request is held, what is loaded, what is stored. Never waits.

A request goes through: lookup sent on arrival -> asked by vLLM ("ask again" until the answer is there) -> claim, when
the held prefix is longer than what the engine has itself -> blocks allocated -> load ordered -> every rank has
reported -> lease released. Stores follow the tokens: a chunk is ordered once the step of its last token is over; where
vLLM takes blocks from requests that run (sliding windows), in that step, whose forward the copy waits for.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lmcache.connectors.session import SchedulerSession
from lmcache.connectors.vllm.claims import Claims, Loading
from lmcache.connectors.vllm.groups import Groups, Tables
from lmcache.connectors.vllm.metadata import StepMetadata, StepReport, Store
from lmcache.connectors.vllm.pins import Pins
from lmcache.connectors.vllm.states import Offer, final_states, state_key
from lmcache.connectors.vllm.tracker import KeyChain, Tracker
from lmcache.keys import Value, namespace
from lmcache.transfer.plan import NOT_WRITTEN

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

LOOKAHEAD_MAX = 4
"""Lookups ahead of their turn: enough that an answer is there when vLLM asks, few enough that a long queue pins
nothing."""


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
        self._claims = Claims(session, groups, world_size, self._chain)
        self._num_workers = num_workers
        self._trackers: dict[str, Tracker] = {}
        self._loading: dict[int, Loading] = {}
        self._reports: dict[int, int] = {}
        self._failed: dict[int, set[int]] = {}
        self._failed_states: set[int] = set()
        self._unable: set[int] = set()
        self._store_owner: dict[int, str] = {}
        self._next = StepMetadata()
        self._last_job = 0
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
            self._claims.ask(tracker, first_chunk=0)

    def match(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """vLLM's question: tokens beyond ``local_tokens`` that we can load, or None for "ask again"."""
        return self._claims.match(self._tracker(request), local_tokens)

    def allocated(self, request: Request, tables: Tables, num_external_tokens: int) -> None:
        """vLLM has given the request its blocks: load into them what was claimed, or let the claim go."""
        tracker = self._tracker(request)
        tracker.tables = [list(table) for table in tables]
        taken = self._claims.take(tracker, num_external_tokens, self._last_job + 1)
        if taken is not None:
            tracker.load_job = self._new_job()
            load, self._loading[tracker.load_job] = taken
            self._next.loads.append(load)

    # --- store --------------------------------------------------------------------------------------------------------

    def build(self, output: SchedulerOutput) -> StepMetadata:
        """The orders of this step; call once a step."""
        self._session.pump()
        for request_id in getattr(output, "preempted_req_ids", None) or ():
            self._preempted(request_id)
        self._follow_blocks(output)
        self._claims.leave_turn(output.num_scheduled_tokens)
        offers = _offers(output) if self._groups.have_states else {}
        for request_id, num_scheduled in output.num_scheduled_tokens.items():
            tracker = self._trackers.get(request_id)
            if tracker is None or tracker.bypassed:
                continue
            after = tracker.known_tokens_after(num_scheduled)
            self._order_stores(tracker, after if self._groups.are_windowed else tracker.confirmed_tokens)
            # Where a request has drafts, its state is what the step leaves only once they are accepted or refused.
            if request_id in offers and not output.scheduled_spec_decode_tokens.get(request_id):
                self._order_states(tracker, offers[request_id], num_scheduled)
        step, self._next = self._next, StepMetadata()
        return step

    def finished(self, request: Request, tables: Tables) -> bool:
        """The request is over; True when its blocks must stay until its stores are (reported as sent exactly once)."""
        tracker = self._trackers.pop(request.request_id, None)
        self._claims.leave_turn((request.request_id,))
        if tracker is None:
            return False
        self._claims.drop(tracker)
        if tracker.load_job is not None:
            # The load still runs: vLLM keeps the blocks until it is reported received, and only that may be reported.
            return False
        tracker.tables = [list(table) for table in tables]
        if not tracker.bypassed:
            self._order_stores(tracker, tracker.confirmed_tokens, is_last=True)
        if not tracker.store_jobs and not tracker.state_jobs:
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
        keys = tracker.keys_upto(chain, stop * step)
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

    def _order_states(self, tracker: Tracker, offers: Sequence[Offer], num_scheduled: int) -> None:
        """Order the states at ends of chunks that this step makes final.

        Args:
            offers: the blocks that vLLM has named for the request in this step.
            num_scheduled: tokens that the step computes, none of them a draft.
        """
        chain, request = self._chain(tracker), tracker.request
        start = int(request.num_computed_tokens)
        stop = start + num_scheduled
        if chain is None or tracker.load_job is not None:
            return
        if stop > request.num_prompt_tokens and any(kind.has_drafts for kind in self._groups.kinds):
            return  # counts of tokens may include drafts of steps that are not over
        for num_tokens, blocks in final_states(self._groups, offers, start, stop).items():
            if num_tokens % chain.chunk_tokens or num_tokens > request.num_tokens:
                continue
            keys = tracker.keys_upto(chain, num_tokens)
            if tracker.bypassed:
                return
            job = self._new_job()
            tracker.state_jobs.add(job)
            self._store_owner[job] = request.request_id
            self._pins.pin(job, blocks)
            key = state_key(keys[num_tokens // chain.chunk_tokens - 1])
            store = Store(job, request.request_id, key, tuple(blocks), chain.salt, chain.namespace, of_states=True)
            self._next.stores.append(store)

    def _preempted(self, request_id: str) -> None:
        """vLLM has taken the blocks back: copies that still run may read what is no longer theirs (of states they do
        not: those are pinned, all of them)."""
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
            self._claims.pause()
        self._failed_states |= report.failed_states
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
            self._claims.end(loading, failed, job in self._failed_states)
            tracker = self._trackers.get(loading.request_id)
            complete = not failed and job not in self._unable | self._failed_states
            self._unable.discard(job)
            self._failed_states.discard(job)
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
            tracker.state_jobs.discard(job)

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
            self._claims.drop(tracker)
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
        return tracker.chain_for(self._engine_namespace, self._session.chunk_tokens)

    def _new_job(self) -> int:
        self._last_job += 1
        return self._last_job


def _offers(output: SchedulerOutput) -> Mapping[str, Sequence[Offer]]:
    """The states that vLLM names in this step, by request."""
    blocks = getattr(output, "kv_connector_block_state", None)
    return blocks.boundary_state_offloads if blocks is not None else {}
