"""A paper engine: vLLM's own scheduler, block tables and connector interface around a model that is only bookkeeping.

The CPU backend has no asynchronous scheduling, and a real model says of a wrong block only that some token came out
differently. Here vLLM's real ``Scheduler`` or ``AsyncScheduler`` gives the orders, our real connector stores and loads
through a real server, and the "model" writes into every slot a number that stands for the tokens up to there. Before it
computes a token it reads, in every KV group, all slots that its attention would read, and names the first one that does
not hold what a recomputation would have put there. Its block tables follow the scheduler's output alone, as a model
runner's do.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from paper_groups import BLOCK, PAGE_BYTES, Full, Local, State, Window, first_read, spec_of
from vllm import EngineArgs, SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from lmcache.connectors.copier import Counters
from lmcache.connectors.vllm.connector import LMCacheMPConnector

VOCABULARY = 4000
SLOT = 1 << 22
"""Numbers of slots are below it, so that float32 holds them exactly."""


@dataclass(frozen=True)
class Shape:
    """What engine is scripted."""

    groups: tuple[Full | Window | Local | State, ...] = (Full(),)
    num_blocks: int = 400
    step_tokens: int = 128
    is_async: bool = False
    num_drafts: int = 0
    prefix_caching: bool = False
    max_requests: int = 8


@dataclass
class Row:
    """A request as the model runner knows it."""

    tokens: list[int]
    tables: list[list[int]]
    num_prompt: int
    drafts: list[int] = field(default_factory=list)
    state_column: int | None = None  # of the tables: where the last step left the state


class PaperEngine:
    """One engine on ``server``'s port; ``settle`` runs what was added to its end."""

    def __init__(self, model: Path, port: int, shape: Shape, seed: int = 0) -> None:
        self.shape = shape
        self._random = random.Random(seed)
        arguments: dict[str, Any] = {}
        if shape.num_drafts:
            method = {"method": "ngram", "num_speculative_tokens": shape.num_drafts, "prompt_lookup_max": 2}
            arguments["speculative_config"] = method
        extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
        self.config = EngineArgs(
            model=str(model),
            dtype="float32",
            max_model_len=4096,
            max_num_seqs=shape.max_requests,
            max_num_batched_tokens=shape.step_tokens,
            enable_prefix_caching=shape.prefix_caching,
            block_size=32,
            kv_transfer_config={
                "kv_connector": "LMCacheMPConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": extra,
            },
            **arguments,
        ).create_engine_config()
        self.config.cache_config.block_size = BLOCK
        self.config.cache_config.num_gpu_blocks = shape.num_blocks
        self.config.scheduler_config.async_scheduling = shape.is_async
        if any(isinstance(kind, State) for kind in shape.groups):
            self.config.cache_config.mamba_cache_mode = "align"
            self.config.cache_config.mamba_block_size = BLOCK
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK, sha256)
        self.kv_config = self._make_kv_config()
        kind = AsyncScheduler if shape.is_async else Scheduler
        self.scheduler = kind(self.config, self.kv_config, StructuredOutputManager(self.config), block_size=BLOCK)
        # The groups lie over each other, as in vLLM: a block id belongs to one of them at a time.
        memory = torch.full((shape.num_blocks, 1, BLOCK, 2), -1.0)
        self._memory = memory.numpy()
        self.worker = LMCacheMPConnector(self.config, KVConnectorRole.WORKER, self.kv_config)
        pages = memory.view(torch.int8).view(shape.num_blocks, 1, 1, PAGE_BYTES)
        caches = [pages if isinstance(kind, State) else memory for kind in shape.groups]
        self.worker.register_kv_caches({f"layer{group}": cache for group, cache in enumerate(caches)})
        self._rows: dict[str, Row] = {}
        self._pending: list[SchedulerOutput] = []
        self.answers: dict[str, list[int]] = {}
        self.num_preempted = 0
        self.num_failed = 0

    def _make_kv_config(self) -> KVCacheConfig:
        groups = [KVCacheGroupSpec([f"layer{i}"], spec_of(kind)) for i, kind in enumerate(self.shape.groups)]
        tensors = [
            KVCacheTensor(PAGE_BYTES * self.shape.num_blocks, [f"layer{index}"], 0, PAGE_BYTES)
            for index in range(len(groups))
        ]
        return KVCacheConfig(self.shape.num_blocks, tensors, groups, kv_cache_layout="LBHNC", hash_block_size=BLOCK)

    def add(self, name: str, prompt: Sequence[int], max_tokens: int = 8) -> None:
        """Add a request."""
        limits = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        limits.update_from_generation_config({}, eos_token_id=1)
        request = Request(name, list(prompt), limits, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)

    def preempt_all(self) -> None:
        """Take the blocks of every request that runs."""
        # It preempts first, and complains then of blocks that a copy holds.
        with contextlib.suppress(RuntimeError):
            self.scheduler.reset_prefix_cache(reset_running_requests=True)

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.scheduler.reset_prefix_cache()

    def abort(self, name: str) -> None:
        """End a request early, as a client does that hangs up."""
        self.answers.setdefault(name, [])
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)

    @property
    def counters(self) -> Counters:
        """What became of the chunks of this worker."""
        half = self.worker._worker
        assert half is not None
        assert half._copier is not None
        return half._copier.counters

    @property
    def state_counters(self) -> Counters:
        """What became of the states."""
        half = self.worker._worker
        assert half is not None
        assert half._states is not None
        return half._states.counters

    @property
    def num_free_blocks(self) -> int:
        """Blocks in vLLM's pool that nobody holds."""
        return int(self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def step(self) -> None:
        """One turn of vLLM's loop. With asynchronous scheduling a step is planned before the one before it has run."""
        has_work = self.scheduler.has_requests()
        if has_work:
            self._pending.append(self.scheduler.schedule())
        if self._pending and (len(self._pending) > self.shape.is_async or not has_work):
            self._run_one()

    def settle(self, turns_max: int = 20000) -> None:
        """Run until nothing is left to do."""
        for _ in range(turns_max):
            if not self.scheduler.has_requests() and not self._pending:
                return
            self.step()
        raise TimeoutError(f"the engine never came to rest: {list(self.scheduler.requests)}")

    def close(self) -> None:
        """Detach both halves."""
        self.scheduler.shutdown()
        self.worker.shutdown()

    # --- the model runner ---------------------------------------------------------------------------------------------

    def _run_one(self) -> None:
        output = self._pending.pop(0)
        self.num_preempted += len(output.preempted_req_ids or ())
        worker, step = self.worker, output.kv_connector_metadata
        assert step is not None
        worker.handle_preemptions(step)
        worker.bind_connector_metadata(step)
        sampled = self._forward(output)
        worker.start_load_kv(None)
        worker.wait_for_save()
        results = worker.get_transfer_results(output.finished_req_ids)
        self.num_failed += len(results.failed_recving)
        report = KVConnectorOutput(
            finished_sending=results.finished_sending or None,
            finished_recving=results.finished_recving or None,
            failed_recving=results.failed_recving,
            invalid_block_ids=worker.get_block_ids_with_load_errors(),
            kv_connector_worker_meta=worker.build_connector_worker_meta(),
        )
        worker.clear_connector_metadata()
        names = list(sampled)
        answer = ModelRunnerOutput(
            names,
            {name: index for index, name in enumerate(names)},
            [sampled[name] for name in names],
            kv_connector_output=report,
        )
        drafts = {name: self._rows[name].drafts for name in names if sampled[name]}
        for outputs in self.scheduler.update_from_output(output, answer).values():
            for one in outputs.outputs:
                self.answers.setdefault(one.request_id, []).extend(one.new_token_ids)
        if self.shape.num_drafts and not self.shape.is_async:
            self.scheduler.update_draft_token_ids(DraftTokenIds(list(drafts), list(drafts.values())))
        if not sampled:
            time.sleep(0.001)  # only a copy is waited for

    def _forward(self, output: SchedulerOutput) -> dict[str, list[int]]:
        assert not output.kv_cache_block_copies
        self._memory[output.new_block_ids_to_zero or []] = 0.0
        for name in output.finished_req_ids:
            self._rows.pop(name, None)
        starts: dict[str, int] = {}
        for new in output.scheduled_new_reqs:
            assert new.prompt_token_ids is not None
            row = Row(list(new.prompt_token_ids), [list(ids) for ids in new.block_ids], len(new.prompt_token_ids))
            self._rows[new.req_id] = row
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, more, start in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            row = self._rows[name]
            if name in cached.resumed_req_ids:
                assert more is not None
                row.tables = [list(ids) for ids in more]
                # What a step in flight has sampled since may have been thrown away by the preemption.
                row.tokens = list(cached.all_token_ids[name])
                row.drafts = []
                row.state_column = None
            elif more is not None:
                for table, ids in zip(row.tables, more, strict=True):
                    table.extend(ids)
            starts[name] = start
        return {
            name: self._compute(
                self._rows[name], starts[name], count, output.scheduled_spec_decode_tokens.get(name, [])
            )
            for name, count in output.num_scheduled_tokens.items()
        }

    def _compute(self, row: Row, start: int, count: int, scheduled_drafts: list[int]) -> list[int]:
        """Tokens ``start`` to ``start + count``, of which the last ones are drafts; returns what is sampled."""
        num_drafts = len(scheduled_drafts)
        # With asynchronous scheduling ``start`` counts drafts that have been refused since.
        start = min(start, len(row.tokens) - 1)
        drafts = row.drafts[:num_drafts] if self.shape.is_async else scheduled_drafts
        stop = start + count - num_drafts
        sequence = row.tokens[:stop] + drafts
        numbers = slots(sequence)
        for group, kind in enumerate(self.shape.groups):
            table = row.tables[group]
            if isinstance(kind, State):
                self._advance_state(row, group, kind, numbers, start)
                continue
            for position in range(start, len(sequence)):
                self._memory[table[position // BLOCK], 0, position % BLOCK] = (numbers[position], group)
            for position in range(first_read(kind, start), len(sequence)):
                held = tuple(self._memory[table[position // BLOCK], 0, position % BLOCK])
                assert held == (numbers[position], group), (
                    f"group {group}, token {position} of {len(sequence)} (computed from {start}): block "
                    f"{table[position // BLOCK]} holds {held}, not {(numbers[position], group)}"
                )
        if any(isinstance(kind, State) for kind in self.shape.groups):
            row.state_column = (len(sequence) - 1) // BLOCK
        if stop < len(row.tokens):
            return []
        accepted: list[int] = []
        for draft in drafts:
            if next_token(row.tokens) != draft:
                break
            row.tokens.append(draft)
            accepted.append(draft)
        row.tokens.append(next_token(row.tokens))
        row.drafts = self._propose(row.tokens)
        return [*accepted, row.tokens[-1]]

    def _advance_state(self, row: Row, group: int, kind: State, numbers: list[int], start: int) -> None:
        """Over the tokens from ``start`` on, of which none is a draft."""
        table, stop = row.tables[group], len(numbers)
        before = (start - 1) // BLOCK if row.state_column is None else row.state_column
        now = (stop - 1) // BLOCK
        if start:
            self._memory[table[now]] = self._memory[table[before]]
            held, expected = self._memory[table[now], 0], (numbers[start - 1], group)
            assert (held == expected).all(), (
                f"group {group}, state after {start} tokens: block {table[before]} holds {held[0]}, not {expected}"
            )
        if kind.has_inner:
            inside, columns = compute_mamba_prefill_checkpoints([stop], [stop - start], BLOCK, BLOCK, 1, False, BLOCK)
            if inside[0] and table[columns[0]]:
                self._memory[table[columns[0]], 0] = (numbers[start + inside[0] - 1], group)
        self._memory[table[now], 0] = (numbers[stop - 1], group)

    def _propose(self, tokens: list[int]) -> list[int]:
        """Drafts, the first ones of which are right."""
        guess = list(tokens)
        right = self._random.randint(0, self.shape.num_drafts)
        for index in range(self.shape.num_drafts):
            guess.append(next_token(guess) if index < right else 7)
        return guess[len(tokens) :]


def slots(tokens: Sequence[int]) -> list[int]:
    """What each token's slot holds: a number that depends on it and on all before it."""
    state, found = 1, []
    for token in tokens:
        state = (state * 1103515245 + token * 12345 + 54321) % (1 << 61)
        found.append((state >> 20) % SLOT)
    return found


def next_token(tokens: Sequence[int]) -> int:
    """What the model says after ``tokens``."""
    return slots(tokens)[-1] % VOCABULARY + 2


def continuation(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The right answer."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


@contextlib.contextmanager
def paper_engine(model: Path, port: int, shape: Shape, seed: int = 0) -> Iterator[PaperEngine]:
    """A paper engine that is detached in the end."""
    engine = PaperEngine(model, port, shape, seed)
    try:
        yield engine
    finally:
        engine.close()
