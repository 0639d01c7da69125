"""Passes through a tier: store, wait until the tier has it, forget L1, look up until it is back, retrieve, compare.

The engine's side is that of ``passes.py``; what the tier has taken is read from the private server's ``/metrics``.
"""

from __future__ import annotations

import os
import time
from array import array
from dataclasses import dataclass, field

import msgspec

from lmcache.benchmark.passes import PassFailed, Results, Runner, expected, seeds_of
from lmcache.benchmark.tier_server import PrivateServer, ServerFailed, TierCounts
from lmcache.connectors.copier import ANSWER_S, LOAD_THREADS
from lmcache.connectors.link import Address, Line
from lmcache.errors import WireError
from lmcache.keys import KEY_BYTES, extend
from lmcache.transfer.plan import Plan
from lmcache.wire.messages import Found, Lookup, Promoting, Release

POLL_S, POLL_S_MAX = 0.005, 0.5
"""Pause between two looks at ``/metrics`` while a tier writes: half of what it seems to need still, within these. So
they disturb it little, and the end is seen when it comes."""

QUIET_S = 30.0
"""A tier that finishes no chunk for so long is stuck: longer than the server's deadline for one put."""

LOAD_S = 300.0
MISSES = 8
"""Prompts that nobody stored, looked up in each pass."""

STORED_BYTES_MAX = 32 << 30
"""No further pass begins once so much was stored."""


@dataclass
class TierResults(Results):
    """As ``Results``; ``store_s`` is until L1 has a pass. A pass is complete where the tier lost nothing of it."""

    write_s: list[float] = field(default_factory=list)  # from L1's first acknowledgement until the tier's last
    miss_s: list[float] = field(default_factory=list)  # one a prompt that nobody stored, until the final answer
    promote_s: list[float] = field(default_factory=list)  # from the first question until all is in L1
    num_stored: int = 0  # chunks that L1 took
    num_kept: int = 0  # of those, chunks that the tier took
    num_refused: int = 0  # chunks that the tier had no room for
    num_missing: int = 0  # chunks that the tier took and did not give back
    num_spoiled: int = 0  # objects whose bytes were not what the tier was given
    num_call_failures: int = 0
    num_timeouts: int = 0
    stuck: str | None = None  # why no further pass could begin
    keys: list[bytes] = field(default_factory=list)


class TierRunner(Runner):
    """A worker of a private server. Close it after use.

    Raises:
        Unattached: the server cannot take such chunks.
    """

    results: TierResults

    def __init__(self, server: PrivateServer, num_tokens: int, token_bytes: int) -> None:
        super().__init__(Address("tcp://127.0.0.1", server.port), num_tokens, token_bytes)
        self._server = server
        self._acked_at = 0.0  # when L1 had the first chunks of this pass; 0 before
        self.results = TierResults(self._memory.shape)

    def measure(self, num_passes: int | None, duration_s: float | None) -> None:
        """So many passes, or as many as begin within so many seconds, at least one; or until ctrl-C, or until the
        tier is stuck. Never raises; ``results`` has what was done."""
        results, started = self.results, time.monotonic()
        number = 0
        try:
            while results.stuck is None and (not number or self._goes_on(number, num_passes, duration_s, started)):
                self._try(number, compared=True)
                number += 1
        except KeyboardInterrupt:
            results.is_interrupted = True
        except ServerFailed as error:
            results.stuck = str(error)
        results.elapsed_s = time.monotonic() - started
        try:
            self._count(self._server.counts())
        except ServerFailed as error:
            results.stuck = results.stuck or str(error)

    def _goes_on(self, number: int, num_passes: int | None, duration_s: float | None, started: float) -> bool:
        stored_bytes = number * self._memory.shape.pass_bytes
        if stored_bytes >= STORED_BYTES_MAX or (num_passes is not None and number >= num_passes):
            return False
        return duration_s is None or time.monotonic() - started < duration_s

    def _count(self, counts: TierCounts) -> None:
        """The books of the tier, whose server has served nobody else."""
        results = self.results
        results.num_kept = counts.puts + counts.skipped_puts
        results.num_refused = counts.refused_puts
        results.num_missing = max(0, results.num_missing - results.num_refused)
        results.num_spoiled = counts.spoiled
        results.num_call_failures, results.num_timeouts = counts.failures, counts.timeouts

    # --- one pass

    def _pass(self, number: int, compared: bool) -> None:
        line = self._line()
        if line is None:
            raise PassFailed("not_attached")
        keys = b"".join(extend(self._parent, os.urandom(4 * self._num_tokens), line.chunk_tokens))
        self._memory.stamp(number)
        self._memory.wipe()
        with self._conversation(line):
            self._write(line, keys)
            self._server.forget_l1()
            num_missing = self._load(line, keys)
            for _ in range(MISSES):
                self._miss(line, len(keys))
        if num_missing:
            raise PassFailed("missing")
        if compared:
            self.results.num_compared += 1
            if not self._memory.is_intact():
                self.results.num_wrong_passes += 1
                raise PassFailed("wrong_bytes")

    def _write(self, line: Line, keys: bytes) -> None:
        """Store, and wait until the tier has said its final word about every chunk."""
        results, num_chunks = self.results, len(keys) // KEY_BYTES
        before = self._server.counts()
        results.keys += [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]
        self._acked_at = 0.0
        self._store(line, keys)
        results.num_stored += num_chunks
        settled, seen_at, pause_s = 0, time.monotonic(), POLL_S
        while settled < num_chunks:
            time.sleep(pause_s)
            counts, now = self._server.counts(), time.monotonic()
            if counts.settled - before.settled > settled:
                settled, seen_at = counts.settled - before.settled, now
                left_s = (now - self._acked_at) * (num_chunks - settled) / settled
                pause_s = min(max(left_s / 2, POLL_S), POLL_S_MAX)
            elif now - seen_at >= QUIET_S:
                reason = self._server.tier()["reason"] or "it gives no reason"
                results.stuck = f"the tier took {settled} of {num_chunks} chunks and none in {QUIET_S:g} s: {reason}"
                raise PassFailed("tier_stuck")
        if counts.refused_puts == before.refused_puts:
            results.write_s.append(seen_at - self._acked_at)

    def _store_part(self, line: Line, keys: bytes, first: int, stop: int) -> None:
        super()._store_part(line, keys, first, stop)
        self._acked_at = self._acked_at or time.monotonic()

    def _load(self, line: Line, keys: bytes) -> int:
        """Bring a pass back from the tier and retrieve it; how many of its chunks the tier does not have."""
        results, num_chunks = self.results, len(keys) // KEY_BYTES
        promote_s, retrieve_s, start, num_missing = 0.0, 0.0, 0, 0
        deadline = time.monotonic() + LOAD_S
        while start < num_chunks:
            if time.monotonic() >= deadline:
                raise PassFailed("load_too_slow")
            found, first_s, whole_s = self._promote(line, keys[start * KEY_BYTES :], deadline)
            if not start:
                results.lookup_s.append(first_s)
            promote_s += whole_s
            if found.num_chunks:
                retrieve_s += self._fetch(line, keys, start, found)
                start += found.num_chunks
            else:  # there is none: what is behind it may be there
                num_missing += 1
                start += 1
        results.num_missing += num_missing
        if not num_missing:
            results.promote_s.append(promote_s)
            results.retrieve_s.append(retrieve_s)
        return num_missing

    def _promote(self, line: Line, keys: bytes, deadline: float) -> tuple[Found, float, float]:
        """The answer, seconds until the first reply, seconds until the answer."""
        request = Lookup(0, keys=keys, counted=False, promote=True)
        started = time.monotonic()
        reply = line.client.call(request, ANSWER_S)
        first_s = time.monotonic() - started
        while isinstance(reply, Promoting):
            if time.monotonic() >= deadline:
                line.client.call(Release(0, lease=reply.promotion), ANSWER_S)
                raise PassFailed("load_too_slow")
            time.sleep(reply.retry_ms / 1e3)
            request = msgspec.structs.replace(request, promotion=reply.promotion)
            reply = line.client.call(request, ANSWER_S)
        found = expected(reply, Found)
        if found.num_chunks * KEY_BYTES > len(keys) or len(found.offsets) != 8 * found.num_chunks:
            raise WireError("the server found more than it was asked for")
        return found, first_s, time.monotonic() - started

    def _fetch(self, line: Line, keys: bytes, start: int, found: Found) -> float:
        """Retrieve the chunks from ``start`` on; seconds."""
        assert line.pool is not None
        started, stop = time.monotonic(), start + found.num_chunks
        source, num_blocks = self._blocks(start, stop), self._memory.shape.num_blocks
        blocks = range(num_blocks + source.start, num_blocks + source.stop)
        seeds = seeds_of(keys[start * KEY_BYTES : stop * KEY_BYTES])
        plan = Plan.of(line.chunk_tokens, blocks, array("Q", found.offsets), seeds)
        failed = self._engine.retrieve(line.pool, plan, array("Q", found.checksums), LOAD_THREADS)
        line.client.call(Release(0, lease=found.lease, failed=array("I", failed).tobytes()), ANSWER_S)
        if failed:
            self.results.num_wrong_chunks += len(failed)
            raise PassFailed("wrong_checksum")
        return time.monotonic() - started

    def _miss(self, line: Line, num_bytes: int) -> None:
        """A prompt that nobody stored."""
        found, _, whole_s = self._promote(line, os.urandom(num_bytes), time.monotonic() + LOAD_S)
        if found.num_chunks:
            raise WireError("the server found what nobody stored")
        self.results.miss_s.append(whole_s)
