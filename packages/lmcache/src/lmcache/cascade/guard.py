"""One tier at arm's length: every call has a deadline, and a tier that fails is left alone until it is well again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from lmcache.cache.quarantine import Quarantine
from lmcache.cascade.gate import Gate, KeyLocks
from lmcache.errors import TierError
from lmcache.system import Clock
from lmcache.tiers.base import Share, Tier, Usage

T = TypeVar("T")

CONTAINS_S = 0.5
GET_S = 5.0
PUT_S = 20.0
DELETE_S = 5.0
USAGE_S = 2.0
OPEN_S = 15.0
CLOSE_S = 2.0

FAILURES_MAX = 3
"""Failures in a row after which a tier is left alone; one that did not answer in time is so at once."""

PAUSE_S, PAUSE_S_MAX = 0.5, 15.0
_PROBE = bytes(32)

log = logging.getLogger("lmcache.cascade")


@dataclass(slots=True)
class Counts:
    """Events of one tier since the service started; shown as metrics with the tier's name as label."""

    lookups: int = field(default=0, metadata={"help": "Keys asked for"})
    hits: int = field(default=0, metadata={"help": "Keys that it had"})
    puts: int = field(default=0, metadata={"help": "Objects stored"})
    put_bytes: int = field(default=0, metadata={"help": "Bytes stored"})
    refused_puts: int = field(default=0, metadata={"help": "Objects it had no room for"})
    skipped_puts: int = field(default=0, metadata={"help": "Objects it had already"})
    gets: int = field(default=0, metadata={"help": "Objects read"})
    get_bytes: int = field(default=0, metadata={"help": "Bytes read"})
    absent_gets: int = field(default=0, metadata={"help": "Objects that were gone when they were read"})
    spoiled: int = field(default=0, metadata={"help": "Objects whose bytes were not what was stored"})
    failures: int = field(default=0, metadata={"help": "Calls that failed"})
    timeouts: int = field(default=0, metadata={"help": "Calls that took longer than their deadline"})
    pauses: int = field(default=0, metadata={"help": "Times it was left alone after failures"})


class Late(TierError):
    """The deadline is over, the call is not: it ends some day, and until then the buffers it was given are its own."""

    def __init__(self, sentence: str, call: asyncio.Task[Any]) -> None:
        super().__init__(sentence)
        self.call = call


class Guarded:
    """A tier as the cascade uses it. ``is_up``: opened, and not left alone."""

    def __init__(self, tier: Tier, name: str, clock: Clock) -> None:
        self.tier = tier
        self.name = name
        self.counts = Counts()
        self.quarantine = Quarantine(clock)
        self.is_up = False
        self.problem: str | None = "not opened yet"
        self.last_usage = Usage()
        self._clock = clock
        self._gate = Gate(max(1, tier.concurrency))
        self._keys = KeyLocks()
        self._failures = 0
        self._is_opened = False
        self._down = asyncio.Event()
        self._down.set()

    # --- calls; all of them raise TierError

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """See ``Tier.contains``."""
        sizes = await self._call("contains", self.tier.contains(keys), CONTAINS_S)
        if len(sizes) != len(keys):
            raise self._failed(f"{len(sizes)} answers to {len(keys)} keys")
        self.counts.lookups += len(keys)
        self.counts.hits += sum(size > 0 for size in sizes)
        return sizes

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """See ``Tier.put``."""
        stored = await self._exclusive("put", key, self.tier.put(key, parts, share), PUT_S)
        if stored:
            self.counts.puts += 1
            self.counts.put_bytes += sum(map(len, parts))
        else:
            self.counts.refused_puts += 1
        return stored

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """See ``Tier.get``."""
        found = await self._exclusive("get", key, self.tier.get(key, parts), GET_S)
        if found:
            self.counts.gets += 1
            self.counts.get_bytes += sum(map(len, parts))
        else:
            self.counts.absent_gets += 1
        return found

    async def delete(self, key: bytes) -> None:
        """See ``Tier.delete``."""
        await self._exclusive("delete", key, self.tier.delete([key]), DELETE_S)

    async def _exclusive(self, what: str, key: bytes, call: Coroutine[Any, Any, T], deadline_s: float) -> T:
        """A call that alone has its key, and one of the tier's places, until it is really over."""
        try:
            await self._keys.acquire(key)
        except BaseException:
            call.close()
            raise
        try:
            await self._gate.enter(is_read=what == "get")
        except BaseException:
            self._keys.release(key)
            call.close()
            raise

        def over(_: object = None) -> None:
            self._gate.leave()
            self._keys.release(key)

        if not self.is_up:
            over()
            call.close()
            raise TierError(f"{self.name} is left alone: {self.problem}")
        try:
            result = await self._call(what, call, deadline_s)
        except Late as late:
            late.call.add_done_callback(over)
            raise
        except BaseException:
            over()
            raise
        over()
        return result

    async def _call(self, what: str, call: Coroutine[Any, Any, T], deadline_s: float) -> T:
        """Run a call on a task of its own, which no deadline and no cancellation of ours cuts short."""
        task = asyncio.ensure_future(call)
        try:
            done, _ = await asyncio.wait([task], timeout=deadline_s)
        except asyncio.CancelledError:
            task.add_done_callback(_ignore)
            raise
        if not done:
            task.add_done_callback(_ignore)
            self.counts.timeouts += 1
            sentence = f"{what} took longer than {deadline_s:g} s"
            self._leave_alone(sentence)
            raise Late(f"{self.name}: {sentence}", task)
        error = task.exception()
        if error is None:
            self._failures = 0
            return task.result()
        if not isinstance(error, TierError):
            log.error("tier %s: %s failed unexpectedly", self.name, what, exc_info=error)
            raise self._failed(f"{type(error).__name__}: {error}")
        raise self._failed(str(error))

    def _failed(self, sentence: str) -> TierError:
        self.counts.failures += 1
        self._failures += 1
        if self._failures >= FAILURES_MAX or not self.is_up:
            self._leave_alone(sentence)
        return TierError(f"{self.name}: {sentence}")

    def _leave_alone(self, sentence: str) -> None:
        self.problem = sentence
        if self.is_up:
            self.is_up = False
            self.counts.pauses += 1
            self._down.set()
            log.warning("tier %s is left alone: %s", self.name, sentence)

    # --- life

    async def keep(self) -> None:
        """Open the tier, and after failures find out when it is well again; runs until cancelled."""
        pause_s = 0.0
        while True:
            await self._down.wait()
            await asyncio.sleep(pause_s)
            try:
                if not self._is_opened:
                    await self._call("open", self.tier.open(), OPEN_S)
                    self._is_opened = True
                await self._call("contains", self.tier.contains([_PROBE]), CONTAINS_S * 2)
            except Late as late:
                # Another attempt beside one that hangs would only add to the heap.
                await asyncio.wait([late.call])
                if not self._is_opened and not late.call.cancelled() and late.call.exception() is None:
                    # It was only slow: to open it again would find the tier in use, by ourselves.
                    self._is_opened = True
                pause_s = min(max(PAUSE_S, pause_s * 2), PAUSE_S_MAX)
            except TierError as error:
                self.problem = str(error).removeprefix(f"{self.name}: ")
                pause_s = min(max(PAUSE_S, pause_s * 2), PAUSE_S_MAX)
            else:
                pause_s = PAUSE_S
                self._failures = 0
                self.is_up, self.problem = True, None
                self._down.clear()
                log.info("tier %s is in use", self.name)

    async def look(self) -> Usage:
        """What the tier holds, by its own word; what it last said where it does not answer."""
        if self.is_up:
            try:
                self.last_usage = await self._call("usage", self.tier.usage(), USAGE_S)
            except TierError as error:
                log.debug("%s", error)
        return self.last_usage

    async def close(self) -> None:
        """Let go, within ``CLOSE_S``."""
        task = asyncio.ensure_future(self.tier.close())
        task.add_done_callback(_ignore)
        await asyncio.wait([task], timeout=CLOSE_S)

    def counters(self) -> dict[str, int]:
        """``Counts`` by name."""
        return asdict(self.counts)


def _ignore(task: asyncio.Task[Any]) -> None:
    """Nobody waits for this result; take note of its exception, so that asyncio does not complain."""
    if not task.cancelled():
        task.exception()
