"""One file of fixed slots, moved by a NIXL agent. All calls here block: they belong to threads.

A slot begins with the header of its object, which is written when all the rest is there and wiped before anything else
is written over it. So the file describes itself, and a process that dies leaves whole objects and empty slots.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib
import importlib.util
import logging
import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from lmcache.errors import TierError
from lmcache.tiers import objects
from lmcache.tiers.nixl_slots import Slots

MODULES = ("nixl", "nixl_cu13", "nixl_cu12")
HEADER_MAX = objects.header_bytes(objects.RANKS_MAX)
FILE_NAME = "nixl_pool.bin"

_SCAN_SLOTS, _SCAN_THREADS = 64, 8  # slots a piece, pieces at a time: a single read mostly waits
_PR_SET_TIMERSLACK = 29
_POLL_SHARE = 1 / 16  # of the time that a transfer has taken: how long it is then left alone


class Agent:
    """A NIXL agent with one backend that moves between memory and files."""

    def __init__(self, backend: str, params: Mapping[str, str]) -> None:
        """Load the library.

        Raises:
            TierError: the library cannot be loaded, or this machine or build lacks the backend.
        """
        nixl = _load()
        self._name = f"lmcache-{os.getpid()}"
        self._backends = [backend]
        strict = nixl.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        config = nixl.nixl_agent_config(enable_prog_thread=False, backends=[], sync_mode=strict)
        try:
            self._agent = nixl.nixl_agent(self._name, config)
            self._agent.create_backend(backend, dict(params))
            kinds = self._agent.get_backend_mem_types(backend)
        except Exception as error:  # the library's own types, which differ from build to build
            raise TierError(f"NIXL has no backend {backend!r} here, or not with these parameters: {error}") from None
        if not {"DRAM_SEG", "FILE_SEG"} <= set(kinds):
            raise TierError(f"NIXL's backend {backend!r} does not move between main memory and files here")

    def add_file(self, descriptor: int, num_bytes: int) -> Any:
        """Make a file known; ``drop`` takes the answer. Raises TierError."""
        try:
            return self._agent.register_memory([(0, num_bytes, descriptor, "")], "FILE", self._backends)
        except Exception as error:  # as above
            raise TierError(f"NIXL does not take the file: {error}") from None

    def drop(self, registered: Any) -> None:
        """Make a file or memory unknown."""
        self._agent.deregister_memory(registered, self._backends)

    def move(self, operation: str, parts: Sequence[memoryview], descriptor: int, offset: int) -> None:
        """ "WRITE" the parts to consecutive places of the file, or "READ" them, in one request.

        Raises:
            TierError: it failed, or came to fewer bytes.
        """
        memory = [(_address_of(part), part.nbytes, 0) for part in parts]
        file = []
        for _, num_bytes, _ in memory:
            file.append((offset, num_bytes, descriptor))
            offset += num_bytes
        agent, failure = self._agent, f"NIXL failed to {operation.lower()} {sum(one[1] for one in memory)} bytes"
        try:
            registered = agent.register_memory([(*one, "") for one in memory], "DRAM", self._backends)
            try:
                local, remote = agent.get_xfer_descs(memory, "DRAM"), agent.get_xfer_descs(file, "FILE")
                transfer = agent.initialize_xfer(operation, local, remote, self._name, b"", self._backends)
                try:
                    start_s = time.monotonic()
                    state = agent.transfer(transfer)
                    while state == "PROC" and (state := agent.check_xfer_state(transfer)) == "PROC":
                        time.sleep((time.monotonic() - start_s) * _POLL_SHARE)
                finally:
                    agent.release_xfer_handle(transfer)
            finally:
                agent.deregister_memory(registered, self._backends)
        except Exception as error:  # as above
            raise TierError(f"{failure}: {error}") from None
        if state != "DONE":
            raise TierError(failure)


class PoolFile:
    """The file, locked against other processes as long as it is open."""

    def __init__(self, agent: Agent, folder: Path, slot_bytes: int, num_slots: int) -> None:
        """Open or make it.

        Raises:
            TierError: the file system refuses, or another process has it.
        """
        self.path = folder / FILE_NAME
        self._agent = agent
        self._slot_bytes = slot_bytes
        self._num_slots = num_slots
        self._zeros = memoryview(mmap.mmap(-1, objects.PAGE_BYTES))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = _open_direct(self.path)
        except OSError as error:
            raise TierError(f"{self.path} cannot be opened: {error.strerror}") from None
        try:
            try:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise TierError(f"{self.path} is in use by another process") from None
            self._registered = agent.add_file(self._descriptor, slot_bytes * num_slots)
        except TierError:
            os.close(self._descriptor)
            raise

    def scan(self) -> Slots:
        """Find the objects in it; slot order stands for the order of use, which no slot records.

        Raises:
            TierError: it cannot be read.
        """
        written = min(-(-os.fstat(self._descriptor).st_size // self._slot_bytes), self._num_slots)
        slots = Slots(self._num_slots, self._slot_bytes, written)
        pieces = [range(start, min(start + _SCAN_SLOTS, written)) for start in range(0, written, _SCAN_SLOTS)]
        with ThreadPoolExecutor(_SCAN_THREADS) as threads:
            headers = chain.from_iterable(threads.map(self._headers, pieces))
        for slot, header in enumerate(headers):
            if header is None:
                slots.release([slot], wiped=True)
            else:
                slots.found(slot, header.key, header.num_bytes, header.tenant)
        return slots

    def is_lost(self) -> bool:
        """Whether somebody deleted it, so that nobody would find it after a restart."""
        return os.fstat(self._descriptor).st_nlink == 0

    def reaches(self, slot: int, num_bytes: int) -> bool:
        """Whether the file is so long; a shorter one was cut by somebody."""
        return os.fstat(self._descriptor).st_size >= slot * self._slot_bytes + num_bytes

    def allocate(self, slot: int) -> None:
        """Have the file system give a slot's room, if it can do that beforehand. Raises OSError."""
        try:
            os.posix_fallocate(self._descriptor, slot * self._slot_bytes, self._slot_bytes)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise

    def write(self, slot: int, parts: Sequence[memoryview]) -> None:
        """Write an object, its header last. Raises TierError."""
        if len(parts) > 1:
            self._agent.move("WRITE", parts[1:], self._descriptor, slot * self._slot_bytes + parts[0].nbytes)
        self._write_header(slot, parts[0])

    def read(self, slot: int, parts: Sequence[memoryview]) -> None:
        """Read an object, header included. Raises TierError."""
        self._agent.move("READ", parts, self._descriptor, slot * self._slot_bytes)

    def wipe(self, slots: Sequence[int]) -> None:
        """End the headers of slots. Raises TierError."""
        for slot in slots:
            self._write_header(slot, self._zeros)

    def close(self) -> None:
        """Let the file go."""
        self._agent.drop(self._registered)
        os.close(self._descriptor)

    def _write_header(self, slot: int, header: memoryview) -> None:
        """Without the agent, whose round trip costs more than these few bytes."""
        try:
            num_written = os.pwrite(self._descriptor, header, slot * self._slot_bytes)
        except OSError as error:
            raise TierError(f"{self.path} cannot be written: {error.strerror}") from None
        if num_written != header.nbytes:
            raise TierError(f"{self.path} cannot be written: {num_written} of {header.nbytes} bytes")

    def _headers(self, slots: range) -> list[objects.Header | None]:
        with contextlib.closing(mmap.mmap(-1, HEADER_MAX)) as memory, memoryview(memory) as buffer:
            return [self._header(slot, buffer) for slot in slots]

    def _header(self, slot: int, buffer: memoryview) -> objects.Header | None:
        """The header of a slot that holds a whole object."""
        try:
            num_read = os.preadv(self._descriptor, [buffer], slot * self._slot_bytes)
            header = objects.decode(buffer[:num_read])
        except OSError as error:
            raise TierError(f"{self.path} cannot be read: {error.strerror}") from None
        except objects.NoObject:
            return None
        fits = header.num_bytes <= self._slot_bytes and self.reaches(slot, header.num_bytes)
        return header if fits else None


def exact_sleeps() -> None:
    """Let sleeps of this thread end on time: Linux adds 50 us otherwise, as much as a small transfer takes."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1000), 0, 0, 0)


def _load() -> Any:
    """The library, quiet on the standard output.

    Raises:
        TierError: none of its packages can be loaded.
    """
    reason = "not installed"
    for name in _installed():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            reason = str(error)
            continue
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
        return module
    raise TierError(f"the library nixl cannot be loaded: {reason}")


def _installed() -> Iterator[str]:
    return (name for name in MODULES if importlib.util.find_spec(name) is not None)


def _open_direct(path: Path) -> int:
    """Open for reading and writing, past the page cache where the file system can."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:
        return os.open(path, flags, 0o600)


def _address_of(part: memoryview) -> int:
    """Where a writable buffer lies in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(part))
