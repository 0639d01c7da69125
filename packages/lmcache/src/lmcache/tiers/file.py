"""Objects in a folder of this machine, one file an object; ``file_folder.py`` has the files.

What is where is known in memory, so a lookup reads nothing. It is learnt by looking through the folder once, in the
background after ``open``; until that is done, keys not seen yet are looked up by file name. A full tier writes a new
object into the file of one that has to go.

A file system cannot be asked to answer in time, and a call of ours ends when its system call does: reads and writes
that hang are the framework's deadline to notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence

from lmcache.errors import TierError
from lmcache.tiers.base import Share, Usage
from lmcache.tiers.catalog import Catalog
from lmcache.tiers.file_folder import FOLDERS, Folder, Outcome
from lmcache.tiers.file_io import Found, oldest_first
from lmcache.tiers.file_threads import Threads
from lmcache.tiers.options import GB, Options

CLOSE_S = 5.0
"""How long ``close`` waits for calls that are under way."""

BATCH = 128
"""Objects taken note of at a time while the event loop waits: less than half a millisecond."""

SURPLUS = 8  # files removed in one go
FULL_S, FULL_S_MAX = 1.0, 60.0

log = logging.getLogger("lmcache.tiers")


class FileTier:
    """The adapter of type ``file``. See ``docs/tiers.md`` for its options."""

    kind = "FileL2Adapter"
    backend = "posix"
    survives = True

    def __init__(self, options: Options) -> None:
        self.place = os.path.abspath(options.text("base_path"))
        self._capacity_bytes = int(options.number("capacity_gb", None, 0.001, 1 << 20) * GB)
        self.concurrency = options.integer("threads", 4, 1, 64)
        self._folder = Folder(self.place)
        self._catalog = Catalog(self._capacity_bytes)
        self._threads = Threads(self.concurrency, "tier-file")
        self._aside = Threads(2, "tier-file-look")  # so that slow writes delay neither lookups nor the scan
        self._full = _Full()
        self._scan: asyncio.Task[None] | None = None
        self._scan_problem: str | None = None
        self._is_known = False  # all that is in the folder
        self._settled: set[bytes] = set()  # until then: keys of which the catalog knows better than the scan
        self._leaving: dict[bytes, asyncio.Future[None]] = {}  # victims whose files are being removed or reused
        self._generation = 0

    async def open(self) -> None:
        """Lock the folder; looking through it goes on behind.

        Raises:
            TierError: another server uses it, or the file system refuses.
        """
        await self._aside.run(self._folder.open)
        self._start_scan()

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """See ``Tier``."""
        sizes = [self._catalog.size(key) for key in keys]
        if not self._is_known:
            unseen = [index for index, size in enumerate(sizes) if not size and keys[index] not in self._settled]
            if unseen:
                by_name = await self._aside.run(self._folder.sizes, [keys[index] for index in unseen])
                for index, size in zip(unseen, by_name, strict=True):
                    sizes[index] = size
        return sizes

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """See ``Tier``. What is too much goes, the longest unused first."""
        while key in self._leaving:
            await asyncio.wait([self._leaving[key]])
        self._catalog.capacity_bytes = self._full.capacity_bytes(self._capacity_bytes)
        if self._full.is_closed() or self._catalog.num_bytes > self._capacity_bytes:  # the latter ends with the scan
            return False
        for _ in range(2):
            stored = await self._put(key, parts, share)
            if stored is not None:
                return stored
            # it failed for want of space: from now on we make do with what we have
            self._full.note(self._catalog.num_bytes)
            self._catalog.capacity_bytes = self._full.capacity_bytes(self._capacity_bytes)
        self._full.close()
        return False

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """See ``Tier``."""
        size = self._catalog.size(key)
        is_absent = not size and (self._is_known or key in self._settled)
        if is_absent or (size and size != sum(map(len, parts))):
            return False
        self._catalog.hold(key)
        try:
            outcome = await self._threads.run(self._folder.read, key, parts, size > 0)
        finally:
            self._catalog.release(key)
        if outcome is Outcome.ABSENT:
            self._catalog.remove(key)
            self._settle(key)
        elif outcome is Outcome.WHOLE and key in self._catalog:
            self._catalog.touch(key)
            self._settle(key)
        return outcome is Outcome.WHOLE

    async def delete(self, keys: Sequence[bytes]) -> None:
        """See ``Tier``."""
        for key in keys:
            self._catalog.hold(key)
        try:
            await self._threads.run(self._folder.remove, keys)
            for key in keys:
                self._catalog.remove(key)
                self._settle(key)
        finally:
            for key in keys:
                self._catalog.release(key)

    async def usage(self) -> Usage:
        """See ``Tier``; while the folder is being looked through, what was found so far."""
        problem = self._scan_problem or self._full.problem()
        if problem is None and not self._folder.is_direct:
            problem = "the file system does not take O_DIRECT: all bytes go through the page cache"
        return Usage(
            num_objects=len(self._catalog),
            used_bytes=self._catalog.num_bytes,
            capacity_bytes=self._capacity_bytes,
            num_evicted=self._catalog.num_evicted,
            tenant_bytes=self._catalog.tenant_bytes(),
            problem=problem,
        )

    async def close(self) -> None:
        """Wait for what is under way, but not for long."""
        self._folder.is_closing = True
        if self._scan is not None:
            self._scan.cancel()
            await asyncio.wait([self._scan])
        ended = await asyncio.gather(self._threads.close(CLOSE_S), self._aside.close(CLOSE_S))
        if all(ended):
            self._folder.close()

    async def _put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool | None:
        """None: the file system is full."""
        num_bytes = sum(map(len, parts))
        victims = self._catalog.reserve(key, num_bytes, share)
        if victims is None:
            return False
        gone = [victim.key for victim in victims]
        reuse = next((victim.key for victim in victims if victim.num_bytes == num_bytes), gone[0] if gone else None)
        stored = False
        try:
            with self._as_leaving(gone):
                rest = [victim for victim in gone if victim != reuse]
                stored = await self._threads.run(self._folder.write, key, parts, rest, reuse)
        finally:
            if self._generation != self._folder.generation:
                self._start_again()
            self._catalog.settle(key, stored)
            if stored:
                self._settle(key)
        return stored or None

    @contextlib.contextmanager
    def _as_leaving(self, keys: Sequence[bytes]) -> Iterator[None]:
        """A key that comes back while its old file is being removed has to wait for that."""
        if not keys:
            yield
            return
        over = asyncio.get_running_loop().create_future()
        for key in keys:
            self._leaving[key] = over
            self._settle(key)
        try:
            yield
        finally:
            for key in keys:
                del self._leaving[key]
            over.set_result(None)

    # --- what is in the folder

    def _settle(self, key: bytes) -> None:
        if not self._is_known:
            self._settled.add(key)

    def _start_scan(self) -> None:
        self._is_known = False
        self._settled.clear()
        self._scan_problem = None
        self._scan = asyncio.create_task(self._look_through())

    def _start_again(self) -> None:
        """The folder was deleted and made anew."""
        log.warning("%s was deleted: begun anew", self.place)
        self._generation = self._folder.generation
        if self._scan is not None:
            self._scan.cancel()
        self._catalog.clear()
        self._start_scan()

    async def _look_through(self) -> None:
        try:
            await self._learn()
        except Exception as error:
            # lookups by name go on, only order and accounts are incomplete
            self._scan_problem = f"not all of the folder could be looked through: {error}"
            if not isinstance(error, TierError):
                log.exception("looking through %s failed", self.place)

    async def _learn(self) -> None:
        runs: list[list[Found]] = []
        for index in range(len(FOLDERS)):
            run = await self._aside.run(self._folder.look, index)
            for at in range(0, len(run), BATCH):
                for _, key, num_bytes, tenant in run[at : at + BATCH]:
                    if key not in self._settled:
                        self._catalog.add(key, num_bytes, tenant)
                await asyncio.sleep(0)
            runs.append(run)
        order = await self._aside.run(oldest_first, runs)
        while order:
            for key in reversed(order[-BATCH:]):
                if key not in self._settled:
                    self._catalog.demote(key)
            del order[-BATCH:]
            await asyncio.sleep(0)
        self._is_known = True
        self._settled.clear()
        while surplus := [victim.key for victim in self._catalog.surplus(SURPLUS)]:
            with self._as_leaving(surplus):
                await self._aside.run(self._folder.remove, surplus)


class _Full:
    """How a full file system is borne: by making do with the room we have, and trying for more after a while."""

    def __init__(self) -> None:
        self._room_bytes: int | None = None
        self._pause_s = FULL_S
        self._until = 0.0
        self._is_closed = False

    def capacity_bytes(self, wanted_bytes: int) -> int:
        """What the catalog may hold now."""
        return wanted_bytes if self._is_over() else min(wanted_bytes, self._room_bytes or 0)

    def is_closed(self) -> bool:
        """Whether even what was freed could not be used."""
        return self._is_closed and not self._is_over()

    def note(self, held_bytes: int) -> None:
        """A write failed for want of space."""
        if self._is_over():
            is_again = self._room_bytes is not None and time.monotonic() < self._until + 2 * self._pause_s
            self._pause_s = min(self._pause_s * 2, FULL_S_MAX) if is_again else FULL_S
            self._until = time.monotonic() + self._pause_s
            self._is_closed = False
        self._room_bytes = held_bytes

    def close(self) -> None:
        """Store nothing until the pause is over."""
        self._is_closed = True

    def problem(self) -> str | None:
        """For people."""
        if self._is_over():
            return None
        if self._is_closed:
            return "the file system is full: nothing is stored for a while"
        return f"the file system is full: no more than {(self._room_bytes or 0) / GB:.2f} GB are used for a while"

    def _is_over(self) -> bool:
        return time.monotonic() >= self._until
