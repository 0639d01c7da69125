"""What ``structural.py`` damages: the connectors' own parts, the real copy engine and a real server with a file tier.

``Rig`` stores and uses prompts as an engine does. Its hooks are places where a fault can be made: around the copies, on
the threads that copy, and on what the server's answers say.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server_running import WAIT_S, Server, eventually, key

from lmcache.connectors.copier import CopyWorker, LoadJob, Outcome, StoreJob
from lmcache.connectors.link import Address, Link
from lmcache.connectors.session import Prefix, SchedulerSession
from lmcache.layout import TensorSpec, make_layout
from lmcache.transfer.plan import CopyEngine, Plan
from lmcache.transfer.pool_map import PoolMap
from lmcache.wire import messages as m

BLOCK_BYTES = 1024  # of one layer
NUM_LAYERS, CHUNK_BLOCKS = 2, 2
BLOCK_TOKENS = 256 // CHUNK_BLOCKS  # 256: the server's chunk
EXTENT_BYTES = BLOCK_BYTES * NUM_LAYERS * CHUNK_BLOCKS  # one page
NUM_BLOCKS = 512
STORED_FROM, LOADED_INTO = 0, NUM_BLOCKS // 2
POISON = b"\xa5"
POLL_S = 0.0002


def contents(name: object) -> bytes:
    """The bytes of a chunk; no part of them occurs in another chunk, or twice."""
    return hashlib.shake_256(repr(name).encode()).digest(EXTENT_BYTES)


class Memory:
    """Blocks of an engine: one tensor a layer."""

    def __init__(self) -> None:
        self.layers = [mmap.mmap(-1, NUM_BLOCKS * BLOCK_BYTES) for _ in range(NUM_LAYERS)]
        specs = [
            TensorSpec(
                f"layer {number}",
                (NUM_BLOCKS, BLOCK_BYTES),
                (BLOCK_BYTES, 1),
                1,
                ctypes.addressof(ctypes.c_char.from_buffer(layer)),
                "uint8",
            )
            for number, layer in enumerate(self.layers)
        ]
        self.layout = make_layout(specs, NUM_BLOCKS, BLOCK_TOKENS)

    def write(self, first_block: int, data: bytes) -> None:
        """One chunk."""
        for number in range(NUM_LAYERS * CHUNK_BLOCKS):
            block, layer = first_block + number // NUM_LAYERS, self.layers[number % NUM_LAYERS]
            piece = data[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            layer[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = piece

    def read(self, first_block: int) -> bytes:
        """One chunk."""
        pieces = []
        for number in range(NUM_LAYERS * CHUNK_BLOCKS):
            block, layer = first_block + number // NUM_LAYERS, self.layers[number % NUM_LAYERS]
            pieces.append(layer[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
        return b"".join(pieces)


@dataclass
class Hooks:
    """Called once each, on the thread that is there; then forgotten."""

    before_store: Callable[[], None] | None = None
    after_store: Callable[[], None] | None = None
    before_load: Callable[[], None] | None = None
    answer: Callable[[m.Reply], m.Reply] | None = None  # to the asking side or the copying one
    request: Callable[[m.Request], m.Request] | None = None  # of the copying side, as it goes out

    def take(self, name: str) -> Any:
        """A hook, which is gone then."""
        hook = getattr(self, name)
        setattr(self, name, None)
        return hook or (lambda *given: given[0] if given else None)


class Steps(CopyEngine):
    """The copy engine, with something happening just before and after its copies."""

    def __init__(self, memory: Memory, hooks: Hooks) -> None:
        super().__init__(memory.layout)
        self._hooks = hooks

    def store(self, pool: PoolMap, plan: Plan, threads: int) -> bytes:
        """As it is."""
        self._hooks.take("before_store")()
        checksums = super().store(pool, plan, threads)
        self._hooks.take("after_store")()
        return checksums

    def retrieve(self, pool: PoolMap, plan: Plan, checksums: Sequence[int], threads: int) -> list[int]:
        """As it is."""
        self._hooks.take("before_load")()
        return super().retrieve(pool, plan, checksums, threads)


class Tampered:
    """A conversation whose answers and requests are changed on their way."""

    def __init__(self, client: Any, hooks: Hooks, kinds: tuple[type, ...]) -> None:
        self._client = client
        self._hooks = hooks
        self._kinds = kinds

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def receive(self) -> list[m.Reply]:
        """Answers, the first one of the kinds changed."""
        return [
            self._hooks.take("answer")(reply) if isinstance(reply, self._kinds) else reply
            for reply in self._client.receive()
        ]

    def call(self, request: m.Request, timeout_s: float) -> m.Reply:
        """A commit, changed."""
        if isinstance(request, m.Commit):
            request = self._hooks.take("request")(request)
        reply: m.Reply = self._client.call(request, timeout_s)
        return reply


@dataclass
class Used:
    """What an engine was told of a load, against what it got."""

    num_used: int = 0
    num_wrong: int = 0
    num_failed: int = 0
    wrong: list[object] = field(default_factory=list)


class Rig:
    """One engine: a scheduler's session, a worker's copier, some memory."""

    def __init__(self, server: Server, tier: Path, name: str = "structural") -> None:
        self.server = server
        self.tier = tier
        self.memory = Memory()
        self.hooks = Hooks()
        address = Address("127.0.0.1", server.rpc_port)
        self.worker = Link(address, f"{name} worker", True, lambda _: registration("worker"))
        self.scheduler = Link(address, f"{name} scheduler", False, lambda _: registration("scheduler"))
        self.copier = CopyWorker(self.worker, Steps(self.memory, self.hooks), 0, lambda _: CHUNK_BLOCKS)
        self.session = SchedulerSession(self.scheduler)
        self.ended: dict[int, Outcome] = {}
        self._last_job = 0
        self.attached()

    def close(self) -> None:
        """Detach."""
        self.session.close()
        self.copier.close()

    def attached(self) -> None:
        """Wait until both sides are, and can be tampered with."""
        for link, kinds in ((self.worker, (m.Granted,)), (self.scheduler, (m.Found,))):
            line = eventually(lambda link=link: link.line, "attached")
            if not isinstance(line.client, Tampered):
                line.client = Tampered(line.client, self.hooks, kinds)

    @property
    def pool(self) -> mmap.mmap:
        """The server's memory, as the worker has it mapped."""
        line = self.worker.line
        assert line is not None
        assert line.pool is not None
        return line.pool.buffer

    # --- stores

    def fill(self, names: Sequence[object]) -> tuple[int, ...]:
        """Compute chunks into blocks, whose ids are returned."""
        for number, name in enumerate(names):
            self.memory.write(STORED_FROM + number * CHUNK_BLOCKS, contents(name))
        return tuple(range(STORED_FROM, STORED_FROM + len(names) * CHUNK_BLOCKS))

    def begin_store(self, names: Sequence[object]) -> int:
        """The job's number."""
        blocks = self.fill(names)
        self._last_job += 1
        keys = b"".join(map(key, names))
        self.copier.store(StoreJob(self._last_job, keys, blocks, "", bytes(m.NAMESPACE_PREFIX_BYTES)))
        return self._last_job

    def store(self, names: Sequence[object]) -> None:
        """Store chunks, to the end of the job."""
        self.outcome(self.begin_store(names))

    def spoil_blocks(self, names: Sequence[object]) -> None:
        """Blocks of a store hold something else from now on."""
        for number in range(len(names)):
            self.memory.write(STORED_FROM + number * CHUNK_BLOCKS, b"\xee" * EXTENT_BYTES)

    def outcome(self, job: int) -> Outcome:
        """Wait for the end of a job."""
        deadline = time.monotonic() + WAIT_S
        while job not in self.ended:
            assert time.monotonic() < deadline, "a job has no end"
            self.ended.update((outcome.id, outcome) for outcome in self.copier.take_outcomes())
            time.sleep(POLL_S)
        return self.ended.pop(job)

    # --- loads

    def ask(self, names: Sequence[object]) -> Prefix | None:
        """What the server holds of a prompt, leased."""
        question = self.session.ask([key(name) for name in names])
        if question is None:
            return None
        deadline = time.monotonic() + WAIT_S
        while not self.session.poll(question):
            assert time.monotonic() < deadline, "a question has no end"
            time.sleep(POLL_S)
        return question.answer

    def offsets(self, names: Sequence[object]) -> list[int]:
        """Where the chunks of a prompt lie in the pool; empty where not all are there."""
        prefix = self.ask(names)
        if prefix is None:
            return []
        self.session.release(prefix)
        return list(prefix.offsets) if prefix.num_chunks == len(names) else []

    def load(self, names: Sequence[object], prefix: Prefix) -> Used:
        """Load a leased prefix, and compare what counts as loaded."""
        job = self.begin_load(names, prefix)
        return self.end_load(names, prefix, job)

    def begin_load(self, names: Sequence[object], prefix: Prefix) -> int:
        """The job's number."""
        num = min(prefix.num_chunks, len(names))
        for number in range(num):
            self.memory.write(LOADED_INTO + number * CHUNK_BLOCKS, POISON * EXTENT_BYTES)
        self._last_job += 1
        self.copier.load(
            LoadJob(
                self._last_job,
                prefix.line.server,
                b"".join(map(key, names[:num])),
                tuple(range(LOADED_INTO, LOADED_INTO + num * CHUNK_BLOCKS)),
                tuple(prefix.offsets),
                tuple(prefix.checksums),
            )
        )
        return self._last_job

    def end_load(self, names: Sequence[object], prefix: Prefix, job: int) -> Used:
        """As vLLM does it: chunks that failed are computed, the others are used; a load that failed without naming
        any is computed as a whole."""
        outcome = self.outcome(job)
        self.session.release(prefix, outcome.failed)
        used = Used(num_failed=len(outcome.failed))
        if not outcome.loaded and not outcome.failed:
            used.num_failed = prefix.num_chunks
            return used
        for number, name in enumerate(names[: prefix.num_chunks]):
            if number in outcome.failed:
                continue
            used.num_used += 1
            if self.memory.read(LOADED_INTO + number * CHUNK_BLOCKS) != contents(name):
                used.num_wrong += 1
                used.wrong.append(name)
        return used

    # --- the tier

    def object(self, name: object) -> Path | None:
        """The file of a chunk, if the tier has it."""
        return next(self.tier.rglob(key(name).hex()), None)

    def in_tier(self, names: Sequence[object]) -> bool:
        """Wait a while until the tier has the chunks, and L1 has none any more."""
        deadline = time.monotonic() + 2.0
        while not all(self.object(name) for name in names):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        while time.monotonic() < deadline:
            self.server.ask("/cache/clear", b"")
            if self.server.l1()["total_object_count"] == 0:
                return True
        return False


def registration(role: str) -> m.Register:
    """Of a rank, or of a scheduler, of a small model."""
    if role == "scheduler":
        return m.Register(0, "scheduler", "tiny", "structural", 0, 1, 0)
    group = m.KernelGroup(
        num_layers=NUM_LAYERS, num_blocks=NUM_BLOCKS, block_tokens=BLOCK_TOKENS, num_heads=1, head_size=64,
        dtype="torch.uint8", is_mla=False, attention_backend="TEST", shape="NL", concrete_shape="2",
    )  # fmt: skip
    return m.Register(0, "worker", "tiny", "structural", 0, 1, EXTENT_BYTES, (0,), (group,))


def uint64s(data: bytes) -> array[int]:
    """Offsets or checksums."""
    return array("Q", data)


def patch_file(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    """Change an object in its place."""
    fd = os.open(path, os.O_RDWR)
    try:
        data = change(bytearray(os.pread(fd, os.fstat(fd).st_size, 0)))
        os.ftruncate(fd, len(data))
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)
