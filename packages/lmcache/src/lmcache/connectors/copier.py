"""The copying side of an engine (a worker process): carries out stores and loads in the background, and answers for
each.

Two threads, so that a load never queues behind a store: the storing one talks to the server (reserve, copy, commit),
the loading one needs no conversation, since extents and expected checksums came with the lookup. Whatever happens to a
job - server gone, pool full, bytes wrong, an exception - it ends in exactly one result, because an engine holds memory
for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lmcache.connectors.link import Line, Link
from lmcache.errors import PeerRefused, PeerSilent, WireError
from lmcache.keys import KEY_BYTES, checksum_seed, tenant_id
from lmcache.transfer.plan import CopyEngine, Mark, Plan
from lmcache.wire.messages import (
    GRANTED,
    HELD,
    NO_EXTENT,
    REFUSED_OWNER,
    Abort,
    Commit,
    Committed,
    Granted,
    Ping,
    Pong,
    Reply,
    Request,
    Reserve,
)

logger = logging.getLogger(__name__)

RESERVE_S = 0.1
"""A store that cannot have its extents by then is dropped: a missed store is a future miss, a late one holds blocks."""

ANSWER_S = 1.0
"""Deadline of the other requests; a server that lets it pass is dropped."""

JOBS_MAX = 1024
"""Jobs that may wait in each queue; a store beyond it is dropped, a load beyond it fails (and is recomputed)."""

STORE_CHUNKS_MAX = 64
"""Chunks of one reservation, so that a long prompt does not hold the pool's free extents while it copies."""

POPULATE_PAUSE_S = 0.5

STORE_THREADS = 1
LOAD_THREADS = min(2, os.cpu_count() or 1)
"""A store runs beside the engine's forward and must not take its cores; a load is what the engine waits for."""


@dataclass(frozen=True, slots=True)
class StoreJob:
    """Store chunks: ``keys`` concatenated, ``blocks`` the engine's block ids, [num_chunks, blocks_per_chunk]
    row-major. ``salt`` and ``namespace`` (its leading bytes): whose they are."""

    id: int
    keys: bytes
    blocks: tuple[int, ...]
    salt: str
    namespace: bytes


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Load chunks of a leased prefix. Block id -1: checked, not written. ``server`` is who granted the lease."""

    id: int
    server: bytes
    keys: bytes
    blocks: tuple[int, ...]
    offsets: tuple[int, ...]  # of this rank, one a chunk
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a job. For a load: ``loaded`` says whether every chunk is in place, ``failed`` names the chunks whose
    bytes were not what was stored (a load can also fail without that: server gone, not attached)."""

    id: int
    is_load: bool
    loaded: bool = False
    failed: tuple[int, ...] = ()


@dataclass
class Counters:
    """What became of the chunks of this process's jobs, for tests and logs."""

    stored_chunks: int = 0
    held_chunks: int = 0
    refused_chunks: int = 0
    aborted_chunks: int = 0
    loaded_chunks: int = 0
    failed_chunks: int = 0


@dataclass
class _Shared:
    """What the engine's thread and ours touch, under one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    marked: set[int] = field(default_factory=set)
    outcomes: list[Outcome] = field(default_factory=list)


class CopyWorker:
    """Background copying for one rank.

    Args:
        rank: of this process, as registered.
        blocks_per_chunk: engine blocks of one chunk, given the server's chunk size in tokens.
    """

    def __init__(self, link: Link, engine: CopyEngine, rank: int, blocks_per_chunk: Callable[[int], int]) -> None:
        self._link = link
        self._engine = engine
        self._rank = rank
        self._blocks_per_chunk = blocks_per_chunk
        self._stores: queue.Queue[tuple[StoreJob, Mark] | None] = queue.Queue(JOBS_MAX)
        self._loads: queue.Queue[tuple[LoadJob, Mark] | None] = queue.Queue(JOBS_MAX)
        self._shared = _Shared()
        self._talking: Line | None = None
        self._late: dict[int, float] = {}  # reservations given up: request id -> when it was sent
        self.counters = Counters()
        self._threads = [
            threading.Thread(target=self._run_stores, name="lmcache store", daemon=True),
            threading.Thread(target=self._run_loads, name="lmcache load", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def store(self, job: StoreJob) -> None:
        """Begin a store; it may be dropped (full queue, full pool, no server), which is a future miss."""
        try:
            self._stores.put_nowait((job, self._engine.mark()))
        except queue.Full:
            self._end(Outcome(job.id, is_load=False))

    def load(self, job: LoadJob) -> None:
        """Begin a load."""
        try:
            self._loads.put_nowait((job, self._engine.mark()))
        except queue.Full:
            self._end(Outcome(job.id, is_load=True))

    def mark(self, job_ids: Sequence[int]) -> None:
        """The engine takes blocks of these stores away: whatever they have copied must not be published.

        A store that has already left the copy is not touched: its bytes were read before the blocks changed hands.
        """
        with self._shared.lock:
            self._shared.marked.update(job_ids)

    def take_outcomes(self) -> list[Outcome]:
        """Jobs that have ended since the last call."""
        with self._shared.lock:
            outcomes, self._shared.outcomes = self._shared.outcomes, []
            return outcomes

    def close(self) -> None:
        """End the threads (a copy that runs is finished first) and detach."""
        self._link.close()
        for waiting in (self._stores, self._loads):
            with contextlib.suppress(queue.Full):
                waiting.put_nowait(None)
        for thread in self._threads:
            thread.join(ANSWER_S * 2)

    def _end(self, outcome: Outcome) -> None:
        with self._shared.lock:
            self._shared.marked.discard(outcome.id)
            self._shared.outcomes.append(outcome)

    # --- loading ------------------------------------------------------------------------------------------------------

    def _run_loads(self) -> None:
        _use_any_cpu()
        while (ordered := self._loads.get()) is not None:
            job, mark = ordered
            outcome = Outcome(job.id, is_load=True)
            try:
                outcome = self._load(job, mark)
            except Exception:
                logger.exception("a load failed unexpectedly; the engine recomputes it")
            self._end(outcome)

    def _load(self, job: LoadJob, mark: Mark) -> Outcome:
        line = self._link.line
        if line is None or line.pool is None or line.server != job.server:
            return Outcome(job.id, is_load=True)
        plan = Plan.of(line.chunk_tokens, job.blocks, job.offsets, self._seeds(job.keys), mark)
        try:
            failed = self._engine.retrieve(line.pool, plan, job.checksums, LOAD_THREADS)
        except OSError as error:
            self._link.drop(line, f"the pool's memory is gone ({error.strerror})")
            return Outcome(job.id, is_load=True)
        self.counters.loaded_chunks += len(job.offsets) - len(failed)
        self.counters.failed_chunks += len(failed)
        if failed:
            logger.warning(
                "%d of %d loaded chunks failed their check; the engine recomputes", len(failed), len(job.offsets)
            )
        return Outcome(job.id, is_load=True, loaded=not failed, failed=tuple(failed))

    # --- storing ------------------------------------------------------------------------------------------------------

    def _run_stores(self) -> None:
        _use_any_cpu()
        while True:
            try:
                # Not without end while a grant may still come that nobody waits for: it has to be given back.
                ordered = self._stores.get(timeout=POPULATE_PAUSE_S if self._populating() or self._late else None)
            except queue.Empty:
                self._give_back_late()
                continue
            if ordered is None:
                break
            job, mark = ordered
            try:
                self._store(job, mark)
            except (PeerSilent, WireError) as error:
                logger.debug("a store was dropped: %s", error)
            except Exception:
                logger.exception("a store failed unexpectedly; it is dropped")
            self._end(Outcome(job.id, is_load=False))
        if self._talking is not None:
            self._talking.client.close()

    def _give_back_late(self) -> None:
        line = self._line()
        if line is not None and self._late:
            with contextlib.suppress(PeerSilent):
                self._abort_late(line)

    def _store(self, job: StoreJob, mark: Mark) -> None:
        line = self._line()
        if line is None or line.pool is None:
            return
        per_chunk = self._blocks_per_chunk(line.chunk_tokens)
        num_chunks = len(job.keys) // KEY_BYTES
        if num_chunks * per_chunk != len(job.blocks):
            return  # planned for a server of another chunk size, which is gone
        for start in range(0, num_chunks, STORE_CHUNKS_MAX):
            stop = min(start + STORE_CHUNKS_MAX, num_chunks)
            keys = job.keys[start * KEY_BYTES : stop * KEY_BYTES]
            blocks = job.blocks[start * per_chunk : stop * per_chunk]
            if not self._store_part(line, job, keys, blocks, per_chunk, mark):
                return

    def _store_part(
        self, line: Line, job: StoreJob, keys: bytes, blocks: tuple[int, ...], per_chunk: int, mark: Mark
    ) -> bool:
        """Store some chunks; False when the rest of the job is pointless."""
        tenant = tenant_id(job.salt, line.tenant_secret)
        granted = self._reserve(line, Reserve(0, keys=keys, tenant=tenant, namespace=job.namespace))
        if granted is None:
            return False
        chosen = [index for index, state in enumerate(granted.states) if state == GRANTED]
        self.counters.held_chunks += granted.states.count(HELD)
        self.counters.refused_chunks += len(granted.states) - len(chosen) - granted.states.count(HELD)
        if not chosen:
            return True
        ticket = granted.ticket
        try:
            offsets = array("Q", granted.offsets)
            if any(offsets[index] == NO_EXTENT for index in chosen):
                raise WireError("the server granted an extent without saying where")
            seeds = self._seeds(b"".join(keys[i * KEY_BYTES : (i + 1) * KEY_BYTES] for i in chosen))
            plan = Plan.of(
                line.chunk_tokens,
                [block for i in chosen for block in blocks[i * per_chunk : (i + 1) * per_chunk]],
                [offsets[i] for i in chosen],
                seeds,
                mark,
            )
            assert line.pool is not None
            try:
                checksums = self._engine.store(line.pool, plan, STORE_THREADS)
            except OSError as error:
                ticket = 0  # ends with the line
                self._link.drop(line, f"the pool's memory is gone ({error.strerror})")
                return False
            with self._shared.lock:
                marked = job.id in self._shared.marked
            if not marked:
                committed = self._call(line, Commit(0, ticket=ticket, checksums=checksums), ANSWER_S)
                ticket = 0
                self.counters.stored_chunks += committed.num_chunks if isinstance(committed, Committed) else 0
        finally:
            if ticket and self._link.line is line:
                self.counters.aborted_chunks += len(chosen)
                self._call(line, Abort(0, ticket=ticket), ANSWER_S)
        return not marked

    def _reserve(self, line: Line, request: Reserve) -> Granted | None:
        """Extents for keys; None when refused or late. A grant that comes late is given back when it comes."""
        self._abort_late(line)
        request_id = line.client.send(request)
        self._late[request_id] = time.monotonic()
        deadline = time.monotonic() + RESERVE_S
        while (left_s := deadline - time.monotonic()) > 0 and line.client.poll(left_s):
            for reply in line.client.receive():
                if reply.id == request_id:
                    del self._late[request_id]
                    return reply if isinstance(reply, Granted) else None
                self._give_back(line, reply)
        return None

    def _abort_late(self, line: Line) -> None:
        for reply in line.client.receive():
            self._give_back(line, reply)
        if self._late and time.monotonic() - min(self._late.values()) > ANSWER_S:
            self._link.drop(line, f"the server did not answer a reservation within {ANSWER_S:g} s")
            raise PeerSilent("the server is silent")

    def _give_back(self, line: Line, reply: Reply) -> None:
        if self._late.pop(reply.id, None) is not None and isinstance(reply, Granted) and reply.ticket:
            line.client.send(Abort(0, ticket=reply.ticket))

    def _populating(self) -> bool:
        """Between stores: enter the next piece of the pool into the page table. True while there is more to come."""
        try:
            line = self._line()
            if line is None or line.pool is None:
                return True
            has_more = self._engine.prepare(line.pool, line.ready_bytes, line.chunk_tokens)
            if not has_more and line.ready_bytes < line.pool.size_bytes:
                pong = self._call(line, Ping(0), ANSWER_S)
                if isinstance(pong, Pong):
                    line.ready_bytes = pong.ready_bytes
            return line.pool.populated_bytes < line.pool.size_bytes
        except (WireError, OSError) as error:
            logger.debug("page tables are not filled ahead: %s", error)
            return True

    def _call(self, line: Line, request: Request, timeout_s: float) -> Reply | None:
        """One request; None when the server refused it. A server that is silent is dropped."""
        try:
            return line.client.call(request, timeout_s)
        except PeerRefused as error:
            if error.code != REFUSED_OWNER:
                logger.warning("the server refused a %s: %s", type(request).__name__.lower(), error)
            return None
        except PeerSilent as error:
            self._link.drop(line, str(error))
            raise

    def _line(self) -> Line | None:
        """The current line, for the storing thread, which is the one that talks."""
        line = self._link.line
        if line is not None and line.client.is_over:
            self._link.drop(line, "the server ended the conversation")
            line = None
        if line is not self._talking:
            if self._talking is not None:
                self._talking.client.close()
            self._talking = line
            self._late.clear()
        return line

    def _seeds(self, keys: bytes) -> list[int]:
        return [checksum_seed(keys[i : i + KEY_BYTES], self._rank) for i in range(0, len(keys), KEY_BYTES)]


def _use_any_cpu() -> None:
    """Threads inherit the pinning of the engine's worker; copies beside its forward belong on the other cores."""
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))
