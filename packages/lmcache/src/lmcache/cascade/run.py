"""The cascade as a whole: keeps the tiers, keeps the line to the core, does what the core orders."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from lmcache.cache.quarantine import Spoiled
from lmcache.cascade.guard import Guarded
from lmcache.cascade.line import ANSWER_S, CoreLine, open_line
from lmcache.cascade.promoting import Promoter
from lmcache.cascade.writing import Writer
from lmcache.errors import LMCacheError, TierError
from lmcache.keys import KEY_BYTES
from lmcache.system import Clock
from lmcache.tiers.base import Tier, Usage
from lmcache.wire.orders import Orders, Work

WRITE_BYTES_MAX = 256 << 20
READ_BYTES_MAX = 256 << 20
"""Extents in hand at a time, each way; an eighth of L1 where that is less."""

ORDERS_S = 10.0
RETRY_S = 0.5

log = logging.getLogger("lmcache.cascade")


@dataclass(frozen=True, slots=True)
class TierState:
    """One tier for people and dashboards; ``quarantined``: its last objects that were not what was stored."""

    name: str
    tier: Tier
    is_up: bool
    problem: str | None
    usage: Usage
    counters: dict[str, int]
    quarantined: tuple[Spoiled, ...]


class Cascade:
    """Runs in one event loop. ``run`` ends by cancellation only."""

    def __init__(
        self, attach_path: str, token: bytes, tiers: Sequence[tuple[str, Tier]], *, policy: str, clock: Clock
    ) -> None:
        """``tiers``: name and adapter, uppermost first. ``policy``: "write-through", "write-back" or "read-only"."""
        self._attach_path = attach_path
        self._token = token
        self._policy = policy
        self._tiers = [Guarded(tier, name, clock) for name, tier in tiers]
        self._changed = asyncio.Event()
        self._writer = Writer(self._tiers, self._changed.set)
        self._promoter = Promoter(self._tiers, READ_BYTES_MAX)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._write_bytes_max = WRITE_BYTES_MAX

    async def run(self) -> None:
        """Attach, obey, attach again."""
        keepers = [asyncio.create_task(tier.keep()) for tier in self._tiers]
        told: str | None = None
        try:
            while True:
                try:
                    await self._converse()
                except LMCacheError as error:
                    if str(error) != told:
                        told = str(error)
                        log.debug("no line to the core: %s", told)
                for keeper in keepers:
                    if keeper.done():
                        keeper.result()  # a tier that nobody keeps is a fault of ours: end with its exception
                gc.collect()  # exceptions hold frames, and those the old line's mapping, whose end the core waits for
                await asyncio.sleep(RETRY_S)
        finally:
            for keeper in keepers:
                keeper.cancel()

    async def close(self) -> None:
        """Let go of the tiers; writes that are under way get a moment."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=0.5)
        await self._promoter.close()
        await asyncio.gather(*(tier.close() for tier in self._tiers))

    async def states(self) -> list[TierState]:
        """How each tier stands, uppermost first."""
        usages = await asyncio.gather(*(tier.look() for tier in self._tiers))
        return [
            TierState(
                tier.name,
                tier.tier,
                tier.is_up,
                tier.problem or usage.problem,
                usage,
                tier.counters(),
                tier.quarantine.latest(),
            )
            for tier, usage in zip(self._tiers, usages, strict=True)
        ]

    async def names_of(self, keys: Sequence[bytes]) -> list[str | None]:
        """For each key the name of the uppermost tier that has it."""
        places = await self._promoter.places(keys)
        return [None if place is None else self._tiers[place.level].name for place in places]

    async def _converse(self) -> None:
        """One line, until it breaks."""
        line = await open_line(
            self._attach_path,
            self._token,
            write_back=self._policy == "write-back",
            read_only=self._policy == "read-only",
        )
        self._write_bytes_max = min(WRITE_BYTES_MAX, max(1, line.pool_bytes // 8))
        self._promoter.limit(min(READ_BYTES_MAX, max(1, line.pool_bytes // 8)))
        asked: set[asyncio.Task[Work]] = set()
        offered = -1
        try:
            while not line.is_lost.is_set():
                credit = self._credit()
                if not asked or (credit > 0 and offered <= 0) or (offered > 0 and credit >= 2 * offered):
                    offered = credit
                    question = Orders(0, wait_s=ORDERS_S, write_bytes=credit)
                    asked.add(asyncio.create_task(line.ask(question, Work, ORDERS_S + ANSWER_S)))
                self._changed.clear()
                change = asyncio.create_task(self._changed.wait())
                done, _ = await asyncio.wait({*asked, change}, timeout=1.0, return_when=asyncio.FIRST_COMPLETED)
                change.cancel()
                for answer in asked & done:
                    asked.discard(answer)
                    self._obey(line, answer.result())
        finally:
            for question_task in asked:
                question_task.cancel()
            await line.close()

    def _credit(self) -> int:
        """Bytes of writes that could be begun now."""
        if self._policy == "read-only" or not any(tier.is_up for tier in self._tiers):
            return 0
        return max(0, self._write_bytes_max - self._writer.used_bytes)

    def _obey(self, line: CoreLine, work: Work) -> None:
        self._promoter.cancel(work.cancelled)
        for order in work.writes:
            self._start(self._writer.write(line, order))
        for wanted in work.wanted:
            self._start(self._promoter.promote(line, wanted))
        spoiled = work.spoiled
        for start in range(0, len(spoiled), KEY_BYTES):
            self._start(self._forget(spoiled[start : start + KEY_BYTES]))

    def _start(self, job: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(job)
        self._tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a job of the cascade failed unexpectedly", exc_info=error)

    async def _forget(self, key: bytes) -> None:
        """An engine found this chunk's bytes wrong: no tier may serve it again."""
        for tier in self._tiers:
            if tier.is_up:
                try:
                    await tier.delete(key)
                    tier.counts.spoiled += 1
                except TierError as error:
                    log.debug("not deleted: %s", error)
