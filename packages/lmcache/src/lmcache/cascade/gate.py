"""Who may use a tier now: at most so many calls at a time, reads before writes, one call a key."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class Gate:
    """``places`` calls at a time; whoever waits for a read goes before all who wait for a write."""

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: dict[bool, deque[asyncio.Future[None]]] = {True: deque(), False: deque()}

    async def enter(self, *, is_read: bool) -> None:
        """Wait for a place, which is the caller's until ``leave``."""
        if self._free > 0:
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[is_read].append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        """Hand the place on."""
        for is_read in (True, False):
            waiting = self._waiting[is_read]
            while waiting:
                turn = waiting.popleft()
                if not turn.done():
                    turn.set_result(None)
                    return
        self._free += 1


class KeyLocks:
    """One holder a key."""

    def __init__(self) -> None:
        self._locks: dict[bytes, tuple[asyncio.Lock, int]] = {}

    async def acquire(self, key: bytes) -> None:
        """Wait for the key."""
        lock, users = self._locks.get(key) or (asyncio.Lock(), 0)
        self._locks[key] = (lock, users + 1)
        try:
            await lock.acquire()
        except asyncio.CancelledError:
            self._forget(key)
            raise

    def release(self, key: bytes) -> None:
        """Let the next one have it."""
        self._locks[key][0].release()
        self._forget(key)

    @contextlib.asynccontextmanager
    async def hold(self, key: bytes) -> AsyncIterator[None]:
        """``acquire`` and ``release``."""
        await self.acquire(key)
        try:
            yield
        finally:
            self.release(key)

    def _forget(self, key: bytes) -> None:
        lock, users = self._locks[key]
        if users == 1:
            del self._locks[key]
        else:
            self._locks[key] = (lock, users - 1)


class Budget:
    """Bytes that may be in hand at once. One that is larger than all of it gets through alone."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.used_bytes = 0
        self._freed = asyncio.Condition()

    async def take(self, num_bytes: int) -> None:
        """Wait until so many bytes more fit."""
        async with self._freed:
            await self._freed.wait_for(lambda: not self.used_bytes or self.used_bytes + num_bytes <= self.bytes_max)
            self.used_bytes += num_bytes

    async def give(self, num_bytes: int) -> None:
        """Bytes are free again."""
        async with self._freed:
            self.used_bytes -= num_bytes
            self._freed.notify_all()
