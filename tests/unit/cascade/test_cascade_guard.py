"""A tier at arm's length: deadlines, failures in a row, and who may call it when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from virtual_time import VirtualClock, run

from lmcache.cascade import guard
from lmcache.cascade.gate import Budget, Gate, KeyLocks
from lmcache.cascade.guard import Guarded, Late
from lmcache.errors import TierError
from lmcache.tiers.base import Share, Usage

KEY, OTHER = bytes([1]) * 32, bytes([2]) * 32
PARTS = [memoryview(bytearray(4096))]
SHARE = Share(bytes(16))


class Scripted:
    """A tier that does what the test says: ``fails`` raises, ``hangs`` waits until it is cleared."""

    kind, backend, place, survives, concurrency = "Scripted", "none", None, False, 1

    def __init__(self, concurrency: int = 1) -> None:
        self.concurrency = concurrency
        self.fails = False
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.calls: list[str] = []
        self.num_running = self.num_running_max = 0

    async def _call(self, what: str) -> None:
        self.calls.append(what)
        self.num_running += 1
        self.num_running_max = max(self.num_running, self.num_running_max)
        try:
            await self.go_on.wait()
            await asyncio.sleep(0.01)
            if self.fails:
                raise TierError("the store said no")
        finally:
            self.num_running -= 1

    async def open(self) -> None:
        """As scripted."""
        await self._call("open")

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """Nothing is there."""
        await self._call("contains")
        return [0] * len(keys)

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """As scripted."""
        await self._call(f"put {key[0]}")
        return True

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """As scripted."""
        await self._call(f"get {key[0]}")
        return True

    async def delete(self, keys: Sequence[bytes]) -> None:
        """As scripted."""
        await self._call("delete")

    async def usage(self) -> Usage:
        """As scripted."""
        await self._call("usage")
        return Usage(num_objects=7)

    async def close(self) -> None:
        """As scripted."""
        await self._call("close")


async def opened(tier: Scripted) -> tuple[Guarded, asyncio.Task[None]]:
    """The tier in use, and the task that keeps it."""
    guarded = Guarded(tier, "scripted", VirtualClock())
    keeper = asyncio.create_task(guarded.keep())
    while not guarded.is_up:
        await asyncio.sleep(0.01)
    return guarded, keeper


async def ended(keeper: asyncio.Task[None]) -> None:
    keeper.cancel()
    await asyncio.wait([keeper])


def test_a_call_that_is_late_fails_at_its_deadline_and_the_tier_is_left_alone_until_it_is_well() -> None:
    async def test() -> None:
        tier = Scripted(concurrency=2)
        guarded, keeper = await opened(tier)
        tier.go_on.clear()
        started = asyncio.get_running_loop().time()
        with pytest.raises(Late) as late:
            await guarded.get(KEY, PARTS)
        assert asyncio.get_running_loop().time() - started == pytest.approx(guard.GET_S)
        assert not guarded.is_up
        assert not late.value.call.done(), "the call itself is not cut short: its buffers are the tier's"
        num_calls = len(tier.calls)
        with pytest.raises(TierError, match="left alone"):
            await guarded.put(OTHER, PARTS, SHARE)
        assert len(tier.calls) == num_calls, "a tier that is left alone is not asked"
        await asyncio.sleep(60)
        assert not guarded.is_up, "a probe that hangs is no recovery"
        tier.go_on.set()
        await asyncio.sleep(2 * guard.PAUSE_S_MAX)
        assert guarded.is_up
        assert await guarded.get(KEY, PARTS)
        assert (guarded.counts.timeouts >= 1, guarded.counts.pauses) == (True, 1)
        await ended(keeper)

    run(test())


def test_a_late_call_keeps_its_key_and_its_place_until_it_is_over() -> None:
    async def test() -> None:
        tier = Scripted(concurrency=1)
        guarded, keeper = await opened(tier)
        tier.go_on.clear()
        with pytest.raises(Late):
            await guarded.get(KEY, PARTS)
        guarded.is_up = True  # as if a probe had found it well while the call still hangs
        second = asyncio.create_task(guarded.put(KEY, PARTS, SHARE))
        await asyncio.sleep(1)
        assert "put 1" not in tier.calls
        tier.go_on.set()
        assert await second
        assert tier.num_running_max <= 2, "one call and one probe"
        await ended(keeper)

    run(test())


def test_failures_in_a_row_and_only_those_pause_a_tier() -> None:
    async def test() -> None:
        tier = Scripted()
        guarded, keeper = await opened(tier)
        for _ in range(5):
            tier.fails = True
            for _ in range(guard.FAILURES_MAX - 1):
                with pytest.raises(TierError, match="the store said no"):
                    await guarded.get(KEY, PARTS)
            tier.fails = False
            assert await guarded.get(KEY, PARTS)
        assert guarded.is_up
        tier.fails = True
        for _ in range(guard.FAILURES_MAX):
            with pytest.raises(TierError):
                await guarded.get(KEY, PARTS)
        assert (guarded.is_up, guarded.problem) == (False, "the store said no")
        tier.fails = False
        await asyncio.sleep(guard.PAUSE_S_MAX * 2)
        assert (guarded.is_up, guarded.problem) == (True, None)
        await ended(keeper)

    run(test())


def test_a_tier_that_cannot_be_opened_is_tried_again_with_growing_pauses() -> None:
    async def test() -> None:
        tier = Scripted()
        tier.fails = True
        guarded = Guarded(tier, "scripted", VirtualClock())
        keeper = asyncio.create_task(guarded.keep())
        await asyncio.sleep(120)
        tried = tier.calls.count("open")
        assert 8 <= tried <= 20
        assert guarded.problem == "the store said no"
        tier.fails = False
        await asyncio.sleep(guard.PAUSE_S_MAX + 1)
        assert guarded.is_up
        assert tier.calls.count("open") == tried + 1
        await ended(keeper)

    run(test())


def test_an_unexpected_exception_is_a_failure_like_any_other(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Scripted):
        async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
            raise ZeroDivisionError("oh")

    async def test() -> None:
        guarded, keeper = await opened(Broken())
        with pytest.raises(TierError, match="ZeroDivisionError: oh"):
            await guarded.get(KEY, PARTS)
        assert guarded.is_up
        await ended(keeper)

    run(test())
    assert "failed unexpectedly" in caplog.text


def test_a_wrong_number_of_answers_is_a_failure() -> None:
    class Short(Scripted):
        async def contains(self, keys: Sequence[bytes]) -> list[int]:
            return [0]

    async def test() -> None:
        guarded, keeper = await opened(Short())
        with pytest.raises(TierError, match="1 answers to 2 keys"):
            await guarded.contains([KEY, OTHER])
        await ended(keeper)

    run(test())


def test_no_more_calls_than_the_tier_wants_run_at_once_and_reads_go_before_writes() -> None:
    async def test() -> None:
        tier = Scripted(concurrency=2)
        guarded, keeper = await opened(tier)
        tier.num_running_max = 0
        tier.go_on.clear()
        keys = [bytes([number]) * 32 for number in range(1, 9)]
        jobs = [asyncio.create_task(guarded.put(key, PARTS, SHARE)) for key in keys[:5]]
        await asyncio.sleep(0.1)
        jobs += [asyncio.create_task(guarded.get(key, PARTS)) for key in keys[5:]]
        await asyncio.sleep(0.1)
        tier.go_on.set()
        await asyncio.gather(*jobs)
        assert tier.num_running_max == 2
        order = tier.calls[-8:]
        assert order[:2] == ["put 1", "put 2"]
        assert set(order[2:5]) == {"get 6", "get 7", "get 8"}
        await ended(keeper)

    run(test())


def test_usage_of_a_tier_that_does_not_answer_is_what_it_last_said() -> None:
    async def test() -> None:
        tier = Scripted()
        guarded, keeper = await opened(tier)
        assert (await guarded.look()).num_objects == 7
        tier.go_on.clear()
        assert (await guarded.look()).num_objects == 7
        assert not guarded.is_up
        tier.go_on.set()
        await ended(keeper)

    run(test())


def test_a_waiter_that_is_cancelled_leaves_its_turn_to_the_next() -> None:
    async def test() -> None:
        gate, locks = Gate(1), KeyLocks()
        await gate.enter(is_read=True)
        await locks.acquire(KEY)
        waiting = [asyncio.create_task(gate.enter(is_read=True)), asyncio.create_task(locks.acquire(KEY))]
        behind = [asyncio.create_task(gate.enter(is_read=False)), asyncio.create_task(locks.acquire(KEY))]
        await asyncio.sleep(0)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        gate.leave()
        locks.release(KEY)
        await asyncio.wait_for(asyncio.gather(*behind), 1)

    run(test())


def test_a_budget_lets_through_what_fits_and_what_is_larger_than_all_of_it_alone() -> None:
    async def test() -> None:
        budget = Budget(10)
        await budget.take(6)
        second = asyncio.create_task(budget.take(5))
        await asyncio.sleep(0.1)
        assert not second.done()
        await budget.give(6)
        await asyncio.wait_for(second, 1)
        await budget.give(5)
        await asyncio.wait_for(budget.take(100), 1)
        assert budget.used_bytes == 100

    run(test())
