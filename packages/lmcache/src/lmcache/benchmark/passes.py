"""Passes over a running server, through the client that engines use: store chunks, look them up, retrieve them.

Each pass stores under keys of its own, which nobody else can name. There is no message to delete them: they stay until
they are the least recently used and the room is needed, and they displace what was used less recently.
"""

from __future__ import annotations

import contextlib
import os
import time
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from lmcache.benchmark.memory import HostMemory, Shape
from lmcache.connectors.copier import ANSWER_S, LOAD_THREADS, STORE_CHUNKS_MAX, STORE_THREADS
from lmcache.connectors.link import GREETING_S, Address, Line, Link
from lmcache.errors import LayoutError, PeerRefused, PeerSilent, WireError
from lmcache.keys import KEY_BYTES, checksum_seed, extend
from lmcache.transfer.plan import CopyEngine, Plan
from lmcache.wire.messages import (
    BUSY,
    FULL,
    GRANTED,
    KEYS_MAX,
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
from lmcache_cli._version import __version__

PASS_BYTES_MAX = 1 << 30
POPULATE_S = 5.0
PAUSE_S = 0.05
"""After a failure, so that a server in trouble is not asked without end."""

_CAUSES = {FULL: "pool_full", BUSY: "busy"}


class Unattached(Exception):
    """The server cannot be used; a sentence says why. ``is_usage``: because of what was asked for."""

    def __init__(self, sentence: str, is_usage: bool = False) -> None:
        super().__init__(sentence)
        self.is_usage = is_usage


@dataclass
class Results:
    """What the passes took and found. Latencies in seconds, one a completed operation."""

    shape: Shape
    elapsed_s: float = 0.0
    num_passes: int = 0  # completed: stored, found, retrieved and right
    lookup_s: list[float] = field(default_factory=list)
    store_s: list[float] = field(default_factory=list)
    retrieve_s: list[float] = field(default_factory=list)
    num_compared: int = 0  # passes whose retrieved bytes were compared with the pattern, one by one
    num_wrong_chunks: int = 0  # chunks whose checksum was not that of what was stored
    num_wrong_passes: int = 0  # passes whose checksums were right and whose bytes were not
    failures: Counter[str] = field(default_factory=Counter)
    is_interrupted: bool = False  # by ctrl-C


class PassFailed(Exception):
    """This pass ends here; the text is its cause, a word for scripts."""


_NAME = "bench server"


class Runner:
    """One attached process. Close it after use.

    Args:
        num_tokens: of one pass, a multiple of the server's chunk.
        token_bytes: KV of one token.

    Raises:
        Unattached: there is no server, or it cannot take such chunks.
    """

    def __init__(self, address: Address, num_tokens: int, token_bytes: int) -> None:
        self._num_tokens = num_tokens
        self._token_bytes = token_bytes
        self._misfit: str | None = None
        self._talking: Line | None = None
        self._parent = os.urandom(KEY_BYTES)
        self._link = Link(address, _NAME, want_pool=True, registration=self._register)
        self._link.wait_first_try(3 * GREETING_S)
        line = self._line()
        if line is None or line.pool is None:
            reason = self._link.reason or f"{address} did not answer"
            self.close()
            raise Unattached(self._misfit or reason.removeprefix(f"{_NAME}: "), is_usage=self._misfit is not None)
        self._memory = HostMemory(Shape(num_tokens, token_bytes, line.chunk_tokens))
        self._engine = CopyEngine(self._memory.layout)
        self.results = Results(self._memory.shape)
        deadline = time.monotonic() + POPULATE_S  # as an engine's worker does it, between stores
        while line.pool.populate(line.ready_bytes) and time.monotonic() < deadline:
            pass

    def run(self, duration_s: float) -> Results:
        """Passes one after another for ``duration_s`` seconds, and at least two, or until ctrl-C. Every byte of what
        the first and the last one retrieve is compared."""
        started = time.monotonic()
        number, is_last = 0, False
        try:
            while not is_last:
                is_last = number > 0 and time.monotonic() - started >= duration_s
                self._try(number, compared=number == 0 or is_last)
                number += 1
        except KeyboardInterrupt:
            self.results.is_interrupted = True
        self.results.elapsed_s = time.monotonic() - started
        return self.results

    def close(self) -> None:
        """Detach: the server frees what this process held."""
        self._link.close()
        if self._talking is not None:
            self._talking.client.close()
            self._talking = None

    # --- one pass

    def _try(self, number: int, compared: bool) -> None:
        try:
            self._pass(number, compared)
            self.results.num_passes += 1
        except PassFailed as failure:
            self.results.failures[str(failure)] += 1
            time.sleep(PAUSE_S)

    def _pass(self, number: int, compared: bool) -> None:
        line = self._line()
        if line is None or line.chunk_tokens != self._memory.shape.chunk_tokens:
            raise PassFailed("not_attached")
        keys = b"".join(extend(self._parent, os.urandom(4 * self._num_tokens), line.chunk_tokens))
        self._memory.stamp(number)
        if compared:
            self._memory.wipe()
        with self._conversation(line):
            self._store(line, keys)
            found = self._lookup(line, keys)
            self._retrieve(line, keys, found)
        if compared:
            self.results.num_compared += 1
            if not self._memory.is_intact():
                self.results.num_wrong_passes += 1
                raise PassFailed("wrong_bytes")

    @contextlib.contextmanager
    def _conversation(self, line: Line) -> Iterator[None]:
        """What ends a conversation ends the pass, each by its own cause."""
        try:
            yield
        except PeerSilent as error:
            self._link.drop(line, str(error))
            raise PassFailed("no_answer") from None
        except PeerRefused as error:
            raise PassFailed(f"refused_{error.code}") from None
        except WireError as error:
            self._link.drop(line, str(error))
            raise PassFailed("bad_answer") from None

    def _store(self, line: Line, keys: bytes) -> None:
        started = time.monotonic()
        num_chunks = len(keys) // KEY_BYTES
        for first in range(0, num_chunks, STORE_CHUNKS_MAX):
            self._store_part(line, keys, first, min(first + STORE_CHUNKS_MAX, num_chunks))
        self.results.store_s.append(time.monotonic() - started)

    def _store_part(self, line: Line, keys: bytes, first: int, stop: int) -> None:
        assert line.pool is not None
        part = keys[first * KEY_BYTES : stop * KEY_BYTES]
        granted = expected(line.client.call(Reserve(0, keys=part), ANSWER_S), Granted)
        missing = [state for state in granted.states if state != GRANTED]
        if missing or len(granted.states) != stop - first:
            if granted.ticket:
                line.client.call(Abort(0, ticket=granted.ticket), ANSWER_S)
            raise PassFailed(_CAUSES.get(missing[0] if missing else GRANTED, "not_granted"))
        plan = Plan.of(line.chunk_tokens, self._blocks(first, stop), array("Q", granted.offsets), seeds_of(part))
        checksums = self._engine.store(line.pool, plan, STORE_THREADS)
        committed = line.client.call(Commit(0, ticket=granted.ticket, checksums=checksums), ANSWER_S)
        if expected(committed, Committed).num_chunks != stop - first:
            raise PassFailed("not_published")

    def _lookup(self, line: Line, keys: bytes) -> Found:
        """Not counted among the server's lookups: its hit rate is about prompts."""
        started = time.monotonic()
        found = expected(line.client.call(Lookup(0, keys=keys, counted=False), ANSWER_S), Found)
        elapsed_s = time.monotonic() - started
        num_chunks = len(keys) // KEY_BYTES
        if found.num_chunks != num_chunks or len(found.offsets) != 8 * num_chunks:
            if found.lease:
                line.client.call(Release(0, lease=found.lease), ANSWER_S)
            raise PassFailed("not_held")
        self.results.lookup_s.append(elapsed_s)
        return found

    def _retrieve(self, line: Line, keys: bytes, found: Found) -> None:
        assert line.pool is not None
        started = time.monotonic()
        num_blocks = self._memory.shape.num_blocks
        blocks = range(num_blocks, 2 * num_blocks)
        plan = Plan.of(line.chunk_tokens, blocks, array("Q", found.offsets), seeds_of(keys))
        failed = self._engine.retrieve(line.pool, plan, array("Q", found.checksums), LOAD_THREADS)
        line.client.call(Release(0, lease=found.lease, failed=array("I", failed).tobytes()), ANSWER_S)
        elapsed_s = time.monotonic() - started
        if failed:
            self.results.num_wrong_chunks += len(failed)
            raise PassFailed("wrong_checksum")
        self.results.retrieve_s.append(elapsed_s)

    def _blocks(self, first_chunk: int, stop_chunk: int) -> range:
        per_chunk = self._memory.shape.chunk_tokens // self._memory.shape.block_tokens
        return range(first_chunk * per_chunk, stop_chunk * per_chunk)

    # --- the line

    def _register(self, chunk_tokens: int) -> Register:
        num_chunks, rest = divmod(self._num_tokens, chunk_tokens)
        self._misfit = None
        if rest:
            self._misfit = f"--num-tokens must be a multiple of the server's chunk of {chunk_tokens} tokens"
        elif num_chunks > KEYS_MAX:
            self._misfit = f"--num-tokens is at most {KEYS_MAX} of the server's chunks of {chunk_tokens} tokens"
        if self._misfit is not None:
            raise LayoutError(self._misfit)
        return Register(
            0,
            role="worker",
            model="no model",
            engine=f"lmcache bench server {__version__}",
            rank=0,
            world_size=1,
            extent_bytes=chunk_tokens * self._token_bytes,
        )

    def _line(self) -> Line | None:
        """The line that stands now; the conversation of the one before it is ended."""
        line = self._link.line
        if line is not self._talking:
            if self._talking is not None:
                self._talking.client.close()
            self._talking = line
        return line


T = TypeVar("T")


def seeds_of(keys: bytes) -> list[int]:
    """Seeds of the checksums of concatenated keys, on rank 0."""
    return [checksum_seed(keys[start : start + KEY_BYTES], 0) for start in range(0, len(keys), KEY_BYTES)]


def expected(reply: object, kind: type[T]) -> T:
    """The reply, if it is a ``kind``; WireError where it answers something else."""
    if not isinstance(reply, kind):
        raise WireError(f"expected {kind.__name__}, the server answered {type(reply).__name__}")
    return reply
