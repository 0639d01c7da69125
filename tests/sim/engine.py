"""A scripted engine: a scheduler process and a worker process for each rank, with the real sessions and copiers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from lmcache.connectors.copier import CopyWorker, LoadJob, Outcome, StoreJob
from lmcache.connectors.link import Link
from lmcache.connectors.session import BUDGET_S, Prefix, SchedulerSession

from .kernel import Kernel, Process, Violation
from .oracle import Oracle
from .standins import FOLDERS
from .worker import SERVER, Model, Worker, registration

LATE_S = 0.05
"""An answer may be that much later than the session's budget: the engine's own steps."""


@dataclass(frozen=True)
class Prompt:
    """The chunks of a prompt, and whose it is."""

    salt: str
    keys: tuple[bytes, ...]


class Prompts:
    """Prompts that share prefixes."""

    def __init__(self, kernel: Kernel, salts: Sequence[str], *, families: int, chunks: int):
        self._kernel = kernel
        self._chains: dict[tuple[str, str, int], tuple[bytes, ...]] = {}
        self._salts = salts
        self._families = families
        self._chunks = chunks

    def draw(self, model: Model) -> Prompt:
        """One prompt for an engine of a model."""
        random = self._kernel.random
        salt = random.choice(self._salts)
        family = random.randrange(self._families)
        length = random.randint(1, self._chunks)
        name = (model.name, salt, family)
        if name not in self._chains:
            key, keys = sha256(repr(name).encode()).digest(), []
            for _ in range(self._chunks):
                key = sha256(key).digest()
                key = bytes([key[0] % len(FOLDERS)]) + key[1:]
                keys.append(key)
            self._chains[name] = tuple(keys)
        return Prompt(salt, self._chains[name][:length])


@dataclass
class Stats:
    """What became of an engine's requests."""

    asked: int = 0
    hits: int = 0
    misses: int = 0
    failed: int = 0
    slowest_s: float = 0.0
    promoted: int = 0


@dataclass
class _Request:
    prompt: Prompt
    blocks: list[int]
    loaded: int = 0  # leading chunks that are in the blocks
    jobs: list[int] = field(default_factory=list)


class Engine:
    """Asks, loads, computes, stores; request after request until told to end."""

    def __init__(
        self, kernel: Kernel, oracle: Oracle, name: str, model: Model, prompts: Prompts, pace_s: float
    ) -> None:
        self.kernel = kernel
        self.oracle = oracle
        self.name = name
        self.model = model
        self.prompts = prompts
        self.pace_s = pace_s  # between two requests, at most
        self.num_blocks = 24
        self.stats = Stats()
        self.is_ending = False
        self.is_done = False
        self.workers = [Worker(kernel, oracle, name, model, self.num_blocks, rank) for rank in range(model.world_size)]
        self.process = Process(kernel, f"{name}.scheduler")
        self._next_job = 0
        self._running = 0
        self.process.enter()
        try:
            self.link = Link(
                SERVER,
                self.process.name,
                False,
                lambda _: registration(model, "scheduler", 0),
            )
            self.session = SchedulerSession(self.link, now=self.process.now)
        finally:
            self.process.leave()
        for _ in range(2):
            self.process.spawn(self._serve())

    @property
    def processes(self) -> list[Process]:
        """All of it."""
        return [self.process, *(worker.process for worker in self.workers)]

    def kill(self) -> None:
        """The whole engine dies."""
        for process in self.processes:
            process.kill()

    def idle(self) -> None:
        """One step without requests: what full sockets kept goes on its way."""
        if self.process.is_alive:
            self.process.enter()
            try:
                self.session.pump()
            finally:
                self.process.leave()

    # --- one request after another

    async def _serve(self) -> None:
        random = self.kernel.random
        await asyncio.sleep(random.uniform(0.0, 0.05))
        while not self.is_ending:
            self._running += 1
            await self._request(self.prompts.draw(self.model))
            self._running -= 1
            await asyncio.sleep(random.uniform(0.0, self.pace_s))
        if not self._running:
            self.is_done = True

    async def _request(self, prompt: Prompt) -> None:
        blocks = self._take_blocks(len(prompt.keys))
        if blocks is None:
            return
        request = _Request(prompt, blocks)
        prefix = await self._ask(request)
        if prefix is not None:
            await self._load(request, prefix)
        await self._compute_and_store(request)
        self._give_blocks(blocks)

    def _take_blocks(self, count: int) -> list[int] | None:
        """The same ids on all ranks, as in a real engine."""
        free = self.workers[0].blocks.free
        if len(free) < count:
            return None
        return [free.pop() for _ in range(count)]

    def _give_blocks(self, blocks: list[int]) -> None:
        self.workers[0].blocks.free = blocks + self.workers[0].blocks.free

    async def _ask(self, request: _Request) -> Prefix | None:
        random, keys = self.kernel.random, request.prompt.keys
        first = random.randrange(len(keys)) if self.kernel.chance(0.1) else 0
        started, stopped_s = self.process.now(), self.process.stopped_s
        question = self.session.ask(keys, first)
        if question is None:
            return None
        self.stats.asked += 1
        gives_up = self.kernel.chance(0.05)
        while not self.session.poll(question):
            if gives_up and self.kernel.chance(0.3):
                self.session.cancel(question)
                return None
            step_s = random.uniform(0.002, 0.02)
            await asyncio.sleep(step_s)
        took_s = self.process.now() - started
        if self.process.stopped_s == stopped_s and not self.process.skew_s:
            self.stats.slowest_s = max(self.stats.slowest_s, took_s)
            if took_s > BUDGET_S + LATE_S:
                raise Violation(f"{self.name} waited {took_s:.3f} s for an answer, its budget is {BUDGET_S:g} s")
        self.stats.promoted += question.request.promotion != 0
        prefix = question.answer
        if prefix is None:
            self.stats.misses += 1
        elif first or self.kernel.chance(0.05):
            self.session.release(prefix)
            return None
        return prefix

    async def _load(self, request: _Request, prefix: Prefix) -> None:
        world, num = self.model.world_size, prefix.num_chunks
        if len(prefix.offsets) != num * world:
            raise Violation(f"{self.name} was answered {len(prefix.offsets)} extents for {num} chunks")
        keys = request.prompt.keys[:num]
        self._next_job += 1
        job_id = self._next_job
        for rank, worker in enumerate(self.workers):
            job = LoadJob(
                job_id,
                prefix.line.server,
                b"".join(keys),
                tuple(request.blocks[:num]),
                tuple(prefix.offsets[rank::world]),
                tuple(prefix.checksums[rank::world]),
            )
            await self._tell(worker, lambda copier, job=job: copier.load(job))  # type: ignore[misc]
        outcomes = await self._wait_for(job_id)
        failed = sorted({index for outcome in outcomes for index in outcome.failed})
        self.session.release(prefix, failed)
        if len(outcomes) < world or not all(outcome.loaded for outcome in outcomes):
            self.stats.failed += 1
            return
        request.loaded = num
        self.stats.hits += 1
        for rank, worker in enumerate(self.workers):
            for key, block_id in zip(keys, request.blocks, strict=False):
                self.oracle.accept(worker.process.name, key, rank, bytes(worker.blocks.data[block_id]))

    async def _compute_and_store(self, request: _Request) -> None:
        keys = request.prompt.keys
        for rank, worker in enumerate(self.workers):
            for key, block_id in list(zip(keys, request.blocks, strict=True))[request.loaded :]:
                data = self.oracle.compute(key, rank, self.model.extent_bytes)
                worker.blocks.data[block_id][:] = data
                self.oracle.issue(key, rank, data)
        await asyncio.sleep(self.kernel.random.uniform(0.0, 0.01))
        if request.loaded == len(keys) or self.kernel.chance(0.05):
            return
        self._next_job += 1
        job = StoreJob(self._next_job, b"".join(keys), tuple(request.blocks), request.prompt.salt, keys[0][:16])
        for worker in self.workers:
            await self._tell(worker, lambda copier: copier.store(job))
        if self.kernel.chance(0.1):
            await self._preempt(request, job.id)
        await self._wait_for(job.id)

    async def _preempt(self, request: _Request, job_id: int) -> None:
        """The scheduler takes the blocks of a store away and uses them for something else."""
        await asyncio.sleep(self.kernel.random.uniform(0.0, 0.01))
        for worker in self.workers:
            if worker.process.is_alive and not worker.process.is_stopped():
                worker.do(lambda copier: copier.mark([job_id]))
                for block_id in request.blocks:
                    worker.blocks.data[block_id][:] = b"\xee" * self.model.extent_bytes

    async def _tell(self, worker: Worker, action: Callable[[CopyWorker], object]) -> None:
        await asyncio.sleep(self.kernel.random.uniform(0.0, 0.002))
        if worker.process.is_alive:
            worker.do(action)

    async def _wait_for(self, job_id: int) -> list[Outcome]:
        """The outcomes of a job; those of dead workers are missing."""
        pause_s = 0.004
        while True:
            for worker in self.workers:
                worker.collect()
            missing = [worker for worker in self.workers if job_id not in worker.outcomes]
            if not any(worker.process.is_alive for worker in missing):
                return [worker.outcomes.pop(job_id) for worker in self.workers if job_id in worker.outcomes]
            pause_s = min(pause_s * 1.5, 0.3)
            await asyncio.sleep(self.kernel.random.uniform(0.5, 1.0) * pause_s)
