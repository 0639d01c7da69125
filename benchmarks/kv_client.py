"""Clients of our server with KV memory on the host, by the classes that the vLLM connector is made of.

``Engine`` goes the connector's way: a scheduler's session asks, a worker's background threads reserve, copy, commit and
load. ``Direct`` makes the same requests and copies one after another on its own thread, as ``lmcache bench server``
does: what many clients at once are measured with, so that nobody has to ask in a loop whether a thread is done.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import random
import time
from array import array
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from upstream import KvShape

from lmcache.connectors import copier
from lmcache.connectors.copier import CopyWorker, LoadJob, StoreJob
from lmcache.connectors.link import Address, Line, Link
from lmcache.connectors.session import Prefix, SchedulerSession
from lmcache.keys import KEY_BYTES, NAMESPACE_PREFIX_BYTES, checksum_seed, extend, namespace
from lmcache.layout import LayerGroup, Layout, Plane
from lmcache.transfer._native import pack_tokens
from lmcache.transfer.plan import CopyEngine, Plan
from lmcache.wire.messages import (
    GRANTED,
    HELD,
    Abort,
    Commit,
    Committed,
    Found,
    Granted,
    Lookup,
    Register,
    Release,
    Reserve,
)

logging.getLogger("lmcache.connectors.link").setLevel(logging.ERROR)  # it tells of each attach

ANSWER_S = 10.0
WAIT_S = 30.0
POLL_S_MIN = 2e-5
POLL_S_PER_BYTE = 5e-13  # of a job's bytes: half a percent of its time at 10 GB/s
Reply = TypeVar("Reply")
Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]


class Memory:
    """Blocks 1 to n hold what is stored, n + 1 to 2n take what is retrieved (0 is left out, as vLLM does), used in a
    shuffled order; all of it is touched. ``rows``: all pieces (one block of K or V of one layer), [piece, byte]."""

    def __init__(self, shape: KvShape) -> None:
        self.shape = shape
        self.num_planes = 2 * shape.num_layers
        self.piece_bytes = shape.token_bytes // self.num_planes * shape.block_tokens
        self.half = shape.num_tokens // shape.block_tokens
        self.num_blocks = 2 * self.half + 1
        self.buffer = mmap.mmap(-1, self.num_planes * self.num_blocks * self.piece_bytes)
        flat = np.frombuffer(self.buffer, np.uint8)
        flat[:] = np.resize(np.random.default_rng(0).integers(0, 256, 9973, np.uint8), flat.size)
        self.rows: Bytes = flat.reshape(-1, self.piece_bytes)
        self.planes: Bytes = flat.reshape(self.num_planes, self.num_blocks, self.piece_bytes)
        self.order = random.Random(0).sample(range(1, self.half + 1), self.half)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        step = self.num_blocks * self.piece_bytes
        planes = [
            Plane(base + plane * step, self.piece_bytes, (), self.piece_bytes) for plane in range(self.num_planes)
        ]
        self.layout = Layout((LayerGroup(tuple(planes), self.num_blocks, shape.block_tokens),))

    def blocks(self, num_tokens: int, behind: int = 0) -> tuple[int, ...]:
        """Blocks of a prompt; ``behind`` = ``half``: those it is retrieved to."""
        return tuple(block + behind for block in self.order[: num_tokens // self.shape.block_tokens])

    def pieces(self, chunk_tokens: int) -> Numbers:
        """Rows of the longest prompt in the order in which chunks hold them."""
        blocks = np.array(self.blocks(self.shape.num_tokens), np.int64)
        by_chunk = blocks.reshape(-1, 1, chunk_tokens // self.shape.block_tokens)
        planes = np.arange(self.num_planes, dtype=np.int64).reshape(1, -1, 1)
        return np.ascontiguousarray(planes * self.num_blocks + by_chunk).reshape(-1)

    def places(self, chunk_tokens: int, offsets: Numbers) -> Numbers:
        """The other way round: [plane, block that takes what is retrieved], which piece of the pool has its content,
        where the chunks begin at ``offsets`` (bytes)."""
        position = np.argsort(np.array(self.order))
        per_chunk = chunk_tokens // self.shape.block_tokens
        planes = np.arange(self.num_planes, dtype=np.int64).reshape(-1, 1)
        firsts = offsets[position // per_chunk] // self.piece_bytes
        return firsts + planes * per_chunk + position % per_chunk

    def stamp(self, seed: int) -> None:
        """Make the content of this seed another one: a number at the head of every piece."""
        self.planes[:, 1 : self.half + 1, :8] = np.frombuffer(seed.to_bytes(8, "little"), np.uint8)

    def wipe(self) -> None:
        """Let nothing of before be where the next prompt is retrieved to."""
        self.planes[:, self.half + 1 :] = 0

    def is_equal(self, seed: int, num_tokens: int) -> bool:
        """Whether every byte that was retrieved is that of the content of this seed."""
        self.stamp(seed)
        wanted = np.array(self.blocks(num_tokens))
        return all(np.array_equal(plane[wanted], plane[wanted + self.half]) for plane in self.planes)


def parent_of(shape: KvShape) -> bytes:
    """Where the keys of every prompt begin: chunks of another size have other keys."""
    return namespace({"model": "benchmark", "token_bytes": shape.token_bytes})


def _registration(shape: KvShape, role: str) -> Any:
    def make(chunk_tokens: int) -> Register:
        extent_bytes = chunk_tokens * shape.token_bytes if role == "worker" else 0
        return Register(0, role=role, model="m", engine="benchmark", rank=0, world_size=1, extent_bytes=extent_bytes)

    return make


def _attached(port: int, shape: KvShape, role: str) -> tuple[Link, Line]:
    """A link and its first line; the pool, if the role has one, is in the page table already."""
    link = Link(Address("tcp://127.0.0.1", port), f"benchmark {role}", role == "worker", _registration(shape, role))
    link.wait_first_try(ANSWER_S)
    line = link.line
    if line is None:
        raise RuntimeError(f"cannot attach: {link.reason}")
    while line.pool is not None and line.pool.populate(line.ready_bytes):
        pass
    return link, line


class Engine:
    """One engine: a scheduler's session and a worker's copying threads. Allocate L1 first (``wait_allocated``)."""

    def __init__(self, port: int, shape: KvShape) -> None:
        self.memory = Memory(shape)
        self._parent = parent_of(shape)
        link, _ = _attached(port, shape, "scheduler")
        self._session = SchedulerSession(link)
        link, line = _attached(port, shape, "worker")
        self.chunk_tokens, self._server = line.chunk_tokens, line.server
        self.worker = CopyWorker(
            link, CopyEngine(self.memory.layout), 0, lambda chunk_tokens: chunk_tokens // shape.block_tokens
        )
        self._job = 0

    def store(self, tokens: list[int]) -> float:
        """Seconds from token ids to the ack of the last chunk.

        Raises:
            RuntimeError: not all of it was stored.
        """
        before = self.worker.counters.stored_chunks
        start = time.perf_counter()
        keys = extend(self._parent, pack_tokens(tokens), self.chunk_tokens)
        self._job += 1
        blocks = self.memory.blocks(len(tokens))
        self.worker.store(StoreJob(self._job, b"".join(keys), blocks, "", self._parent[:NAMESPACE_PREFIX_BYTES]))
        self._outcome()
        seconds = time.perf_counter() - start
        if self.worker.counters.stored_chunks - before != len(keys):
            raise RuntimeError(f"not all of a prompt was stored: {self.worker.counters}")
        return seconds

    def find(self, tokens: list[int]) -> tuple[float, int, Prefix | None]:
        """Seconds from token ids to the answer, chunks held, and their lease."""
        start = time.perf_counter()
        return self._find(extend(self._parent, pack_tokens(tokens), self.chunk_tokens), start)

    def _find(self, keys: list[bytes], start: float) -> tuple[float, int, Prefix | None]:
        question = self._session.ask(keys)
        if question is None:
            raise RuntimeError("the server is gone")
        question.line.client.poll(ANSWER_S)
        while not self._session.poll(question):
            question.line.client.poll(ANSWER_S)
        seconds = time.perf_counter() - start
        return seconds, question.answer.num_chunks if question.answer else 0, question.answer

    def let_go(self, prefix: Prefix | None) -> None:
        """End a lease; waits until the server has heard it, so that the next thing that is timed is alone."""
        if prefix is not None:
            self._session.release(prefix)
            prefix.line.client.poll(ANSWER_S)
            self._session.pump()

    def retrieve(self, tokens: list[int]) -> float:
        """Seconds from token ids to the end of the lease of what was looked up, copied and verified.

        Raises:
            RuntimeError: not all of it is held, or the bytes were not those that were stored.
        """
        start = time.perf_counter()
        keys = extend(self._parent, pack_tokens(tokens), self.chunk_tokens)
        _, num_chunks, prefix = self._find(keys, start)
        if prefix is None or num_chunks != len(keys):
            raise RuntimeError("the server does not hold what was stored")
        self._job += 1
        blocks = self.memory.blocks(len(tokens), self.memory.half)
        offsets, checksums = tuple(prefix.offsets), tuple(prefix.checksums)
        self.worker.load(LoadJob(self._job, self._server, b"".join(keys), blocks, offsets, checksums))
        loaded = self._outcome().loaded
        self._session.release(prefix)
        seconds = time.perf_counter() - start
        prefix.line.client.poll(ANSWER_S)
        self._session.pump()
        if not loaded:
            raise RuntimeError("a load failed")
        return seconds

    def _outcome(self) -> copier.Outcome:
        deadline = time.monotonic() + WAIT_S
        pause_s = max(POLL_S_MIN, self.memory.shape.total_bytes * POLL_S_PER_BYTE)
        while time.monotonic() < deadline:
            for outcome in self.worker.take_outcomes():
                return outcome
            time.sleep(pause_s)
        raise RuntimeError("a job did not end")

    def close(self) -> None:
        """Detach."""
        self._session.close()
        self.worker.close()


class Direct:
    """One client that does one thing after another; ``mixed_load.Client``."""

    def __init__(self, port: int, shape: KvShape) -> None:
        self.memory = Memory(shape)
        self._parent = parent_of(shape)
        self._link, self._line = _attached(port, shape, "worker")
        self.chunk_tokens = self._line.chunk_tokens
        self._engine = CopyEngine(self.memory.layout)

    def find(self, tokens: list[int]) -> tuple[float, int, Any]:
        """Seconds from token ids to the answer, chunks held, and what the answer was to."""
        start = time.perf_counter()
        keys = extend(self._parent, pack_tokens(tokens), self.chunk_tokens)
        found = self._call(Lookup(0, keys=b"".join(keys)), Found)
        return time.perf_counter() - start, found.num_chunks, (keys, found)

    def let_go(self, tokens: list[int], num_chunks: int, pin: Any) -> None:
        """End the lease of what was found."""
        del tokens, num_chunks
        if pin[1].lease:
            self._line.client.call(Release(0, lease=pin[1].lease), ANSWER_S)

    def load(self, tokens: list[int], pin: Any) -> tuple[float, bool]:
        """Seconds of copy, check and release, and whether all of it was right."""
        assert self._line.pool is not None
        keys, found = pin
        start = time.perf_counter()
        plan = Plan.of(
            self.chunk_tokens,
            self.memory.blocks(len(tokens), self.memory.half),
            array("Q", found.offsets),
            _seeds(keys),
        )
        failed = self._engine.retrieve(self._line.pool, plan, array("Q", found.checksums), 1)
        self._line.client.call(Release(0, lease=found.lease, failed=array("I", failed).tobytes()), ANSWER_S)
        return time.perf_counter() - start, not failed

    def keep(self, tokens: list[int]) -> tuple[float, bool]:
        """Seconds of keys, reservation, copy and commit; whether every chunk that was not held has been stored."""
        assert self._line.pool is not None
        start = time.perf_counter()
        keys = extend(self._parent, pack_tokens(tokens), self.chunk_tokens)
        granted = self._call(Reserve(0, keys=b"".join(keys)), Granted)
        chosen = [index for index, state in enumerate(granted.states) if state == GRANTED]
        if len(chosen) + granted.states.count(HELD) != len(keys):
            if granted.ticket:
                self._line.client.call(Abort(0, ticket=granted.ticket), ANSWER_S)
            return time.perf_counter() - start, False
        if chosen:
            offsets, blocks = array("Q", granted.offsets), self.memory.blocks(len(tokens))
            per_chunk = self.chunk_tokens // self.memory.shape.block_tokens
            plan = Plan.of(
                self.chunk_tokens,
                [block for index in chosen for block in blocks[index * per_chunk : (index + 1) * per_chunk]],
                [offsets[index] for index in chosen],
                _seeds([keys[index] for index in chosen]),
            )
            checksums = self._engine.store(self._line.pool, plan, copier.STORE_THREADS)
            committed = self._call(Commit(0, ticket=granted.ticket, checksums=checksums), Committed)
            if committed.num_chunks != len(chosen):
                return time.perf_counter() - start, False
        return time.perf_counter() - start, True

    def _call(self, request: Any, kind: type[Reply]) -> Reply:
        reply = self._line.client.call(request, ANSWER_S)
        if not isinstance(reply, kind):
            raise RuntimeError(f"the server answered {reply}")
        return reply

    def close(self) -> None:
        """Detach."""
        self._link.close()
        self._line.client.close()


class Region:
    """Extents of the server's pool for one prompt, reserved and never committed: for who copies without the server."""

    def __init__(self, port: int, shape: KvShape) -> None:
        self._link, self._line = _attached(port, shape, "worker")
        num_chunks = shape.num_tokens // self._line.chunk_tokens
        granted = self._line.client.call(Reserve(0, keys=os.urandom(num_chunks * KEY_BYTES)), ANSWER_S)
        if not isinstance(granted, Granted) or granted.states.count(GRANTED) != num_chunks:
            raise RuntimeError(f"no extents: {granted}")
        assert self._line.pool is not None
        self.pool: Bytes = np.frombuffer(self._line.pool.buffer, np.uint8)
        self.offsets: Numbers = np.frombuffer(granted.offsets, np.uint64).astype(np.int64)

    def close(self) -> None:
        """Detach; the server frees the extents."""
        del self.pool
        self._link.close()
        self._line.client.close()


def _seeds(keys: list[bytes]) -> list[int]:
    return [checksum_seed(key, 0) for key in keys]
