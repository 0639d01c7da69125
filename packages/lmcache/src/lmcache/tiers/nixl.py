"""Objects in a file of fixed slots that a NIXL agent moves, by whichever of its backends moves files."""

from __future__ import annotations

import asyncio
import errno
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from lmcache.errors import TierError
from lmcache.tiers import objects
from lmcache.tiers.base import Share, Usage
from lmcache.tiers.nixl_pool import HEADER_MAX, MODULES, Agent, PoolFile, exact_sleeps
from lmcache.tiers.nixl_slots import Place, Slots
from lmcache.tiers.options import Options

Result = TypeVar("Result")

_MIB = 1 << 20
_BACKENDS = ("POSIX", "GDS", "GDS_MT")
_BATCH = 128  # keys that are forgotten before the event loop goes on
_FULL_S = 30.0  # how long a full file system is not asked for more room


class NixlTier:
    """A pool of ``pool_size`` slots for objects of at most ``slot_mb`` MiB besides their header."""

    kind = "NixlStoreL2Adapter"
    survives = True
    concurrency = 4

    def __init__(self, options: Options) -> None:
        """Read the options.

        Raises:
            ConfigError: an option is missing or out of its bounds, or the library is not installed.
        """
        if not any(importlib.util.find_spec(name) for name in MODULES):
            options.require(MODULES[0], "nixl")
        self._backend = options.text("backend", _BACKENDS[0])
        if self._backend == "OBJ":
            raise options.error("backend 'OBJ' is an object store: use the type 'object' for that")
        if self._backend == "UCX":
            raise options.error("backend 'UCX' moves bytes between machines and stores none")
        if self._backend not in _BACKENDS:
            raise options.error(f"'backend' is one of {', '.join(_BACKENDS)}")
        self._folder = Path(options.text("base_path"))
        self._num_slots = options.integer("pool_size", 512, 1, 1 << 20)
        slot_mb = options.number("slot_mb", None, 1 / 256, 65536.0)
        self._slot_bytes = objects.padded(int(slot_mb * _MIB)) + HEADER_MAX
        self._params = {name: str(value) for name, value in options.table("params").items()}
        self.backend = f"nixl_{self._backend.lower()}"
        self.place = str(self._folder)
        self._threads = ThreadPoolExecutor(self.concurrency, "tier-nixl", exact_sleeps)
        self._agent: Agent | None = None
        self._file: PoolFile | None = None
        self._slots = Slots(self._num_slots, self._slot_bytes)
        self._num_calls = 0  # that use the file now
        self._too_large_bytes = 0
        self._is_full_until_s = 0.0

    async def open(self) -> None:
        """Create the backend, open the pool and read its headers.

        Raises:
            TierError: the backend or the folder cannot be used.
        """
        await self._call(self._open)

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """See ``Tier``."""
        return [self._slots.objects.size(key) for key in keys]

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """See ``Tier``."""
        file = await self._usable_file()
        num_bytes = sum(part.nbytes for part in parts)
        if num_bytes > self._slot_bytes:
            self._too_large_bytes = num_bytes
            return False
        now_s = asyncio.get_running_loop().time()
        self._slots.fresh_refused = now_s < self._is_full_until_s
        place = self._slots.reserve(key, num_bytes, share)
        if place is None:
            return False
        slots, replaced = self._slots, self._slots.slot(key)
        try:
            await self._call(_write, file, place, parts, [] if replaced is None else [replaced])
        except OSError as error:
            slots.refused(key, place)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise TierError(f"{file.path} cannot grow: {error.strerror}") from None
            self._is_full_until_s = now_s + _FULL_S
            return False
        except BaseException:
            slots.settle(key, place, False)
            raise
        slots.settle(key, place, True)
        return True

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """See ``Tier``."""
        slots, slot = self._slots, self._slots.slot(key)
        num_bytes = sum(part.nbytes for part in parts)
        if self._file is None or slot is None or slots.objects.size(key) != num_bytes:
            return False
        slots.objects.touch(key)
        slots.objects.hold(key)
        try:
            found = await self._call(_read, self._file, slot, key, parts)
        finally:
            slots.objects.release(key)
        if not found and slots.slot(key) == slot:
            slots.release([slots.forget(key)], wiped=False)
        return found

    async def delete(self, keys: Sequence[bytes]) -> None:
        """See ``Tier``."""
        for start in range(0, len(keys), _BATCH):
            slots, file = self._slots, self._file
            ended = [slots.forget(key) for key in keys[start : start + _BATCH] if slots.slot(key) is not None]
            if file is None or not ended:
                continue
            wiped = False
            try:
                await self._call(file.wipe, ended)
                wiped = True
            finally:
                slots.release(ended, wiped)

    async def usage(self) -> Usage:
        """See ``Tier``."""
        held = self._slots.objects
        return Usage(
            num_objects=len(held),
            used_bytes=held.num_bytes,
            capacity_bytes=self._num_slots * self._slot_bytes,
            num_slots=self._num_slots,
            num_evicted=held.num_evicted,
            tenant_bytes=held.tenant_bytes(),
            problem=self._problem(),
        )

    async def close(self) -> None:
        """See ``Tier``."""
        await asyncio.get_running_loop().run_in_executor(None, self._threads.shutdown)
        if self._file is not None:
            self._file.close()
            self._file = None

    async def _run(self, function: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    async def _call(self, function: Callable[..., Result], *args: object) -> Result:
        """Run what uses the file."""
        self._num_calls += 1
        try:
            return await self._run(function, *args)
        finally:
            self._num_calls -= 1

    async def _usable_file(self) -> PoolFile:
        """The pool's file; a new one in place of one that somebody deleted, once no call uses that any more."""
        if self._file is not None and not self._file.is_lost():
            return self._file
        if self._num_calls:
            raise TierError(f"the pool in {self._folder} was deleted")
        if self._file is not None:
            self._file.close()
            self._file = None
        return await self._call(self._open)

    def _open(self) -> PoolFile:
        if self._agent is None:
            self._agent = Agent(self._backend, self._params)
        file = PoolFile(self._agent, self._folder, self._slot_bytes, self._num_slots)
        try:
            self._slots = file.scan()
        except BaseException:
            file.close()
            raise
        self._file = file
        return file

    def _problem(self) -> str | None:
        if asyncio.get_running_loop().time() < self._is_full_until_s:
            return f"the file system of {self._folder} is full, so older objects give way before the pool is"
        if self._too_large_bytes:
            return (
                f"objects of {self._too_large_bytes} bytes do not fit into slots of {self._slot_bytes}: raise slot_mb"
            )
        return None


def _write(file: PoolFile, place: Place, parts: Sequence[memoryview], ended: Sequence[int]) -> None:
    """Put an object into its place, then end the older copies of it."""
    if place.fresh:
        file.allocate(place.slot)
    file.wipe(place.wipe)
    file.write(place.slot, parts)
    file.wipe(ended)


def _read(file: PoolFile, slot: int, key: bytes, parts: Sequence[memoryview]) -> bool:
    """Read an object; False where its slot holds something else by now."""
    try:
        file.read(slot, parts)
        return objects.decode(parts[0]).key == key
    except objects.NoObject:
        return False
    except TierError:
        if file.reaches(slot, sum(part.nbytes for part in parts)):
            raise
        return False
