"""The pool: a simulated tmpfs for its files, and real shared memory behind it."""

# ruff: noqa: ARG002 - signatures are those of what is stood in for
from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

from lmcache.cache.home import POOL, RECORDS
from lmcache.cache.pool import WRITER_LOCK_BASE
from lmcache.cache.records import RECORD_BYTES, RESERVED, parse
from lmcache.keys import KEY_BYTES

from .kernel import Kernel, Process, check_alive

_FIRST_FD = 1_000_000
PAGE_BYTES = 4096


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


_files = _load("sim_memory_files", Path(__file__).parents[1] / "unit" / "cache" / "memory_files.py")
Killed: type[BaseException] = _files.Killed
SeededEntropy: Any = _files.SeededEntropy
_MemoryFiles: Any = _files.MemoryFiles


class Files(_MemoryFiles):  # type: ignore[misc]
    """The file system of one machine. Descriptors that were handed out are counted, as the kernel does."""

    def __init__(self, total_bytes: int) -> None:
        super().__init__(total_bytes)
        self._next_fd = _FIRST_FD
        self.mappings: list[Mapping] = []
        self._open: dict[int, Any] = {}  # descriptor -> description
        self._users: dict[Any, int] = {}
        self._memory: dict[int, int] = {}  # inode -> real descriptor of the memory

    def give_fd(self, description: Any) -> int:
        """A new descriptor of a description."""
        self._next_fd += 1
        self._open[self._next_fd] = description
        self._users[description] = self._users.get(description, 0) + 1
        return self._next_fd

    def send_fd(self, fd: int) -> int:
        """What arrives when a descriptor is sent over a socket."""
        return self.give_fd(self._open[fd])

    def close_fd(self, fd: int) -> None:
        """Close a descriptor; real ones are none of ours."""
        self.let_go(self._open.pop(fd))

    def keep(self, fd: int) -> Any:
        """A mapping keeps the description, too; undone by ``let_go``."""
        description = self._open[fd]
        self._users[description] += 1
        return description

    def let_go(self, description: Any) -> None:
        """One user less."""
        self._users[description] -= 1
        if not self._users[description]:
            del self._users[description]
            description.release()

    def find(self, view: memoryview) -> tuple[Mapping, int] | None:
        """In which mapping a piece of a pool lies, and at which offset; None where it is other memory."""
        address = ctypes.addressof(ctypes.c_char.from_buffer(view))
        for mapping in self.mappings:
            if mapping.base <= address < mapping.base + mapping.size_bytes:
                return mapping, address - mapping.base
        return None

    def may_write(self, mapping: Mapping, offset: int) -> bool:
        """Whether the records say that the extent there is reserved for whoever has this mapping.

        They outlive a server. A pool that is no more may be written to as anybody likes.
        """
        for path, node in self.nodes.items():
            if path.endswith(f"/{POOL}") and node.inode == mapping.inode:
                image = bytes(self.nodes[path[: -len(POOL)] + RECORDS].data[PAGE_BYTES:])
                at = [slot for slot in range(len(image) // RECORD_BYTES) if _offset(image, slot) == offset]
                found = [record for slot in at if (record := parse(image, slot)) is not None]
                return any(record.state == RESERVED and record.writer == mapping.writer for record in found)
        return True

    def read(self, inode: int, offset: int, num_bytes: int) -> bytes:
        """Bytes of a pool."""
        fd = self._memory.get(inode)
        return b"" if fd is None else os.pread(fd, num_bytes, offset)

    def memory(self, node: Any) -> int:
        """The real descriptor of the memory behind a pool file."""
        fd = self._memory.get(node.inode)
        if fd is None:
            fd = self._memory[node.inode] = os.memfd_create("simulated pool")
            os.ftruncate(fd, node.size_bytes)
        return fd

    def damage(self, inode: int, offset: int, random: Random) -> None:
        """One byte of a pool changes."""
        fd = self._memory.get(inode)
        if fd is not None:
            before = os.pread(fd, 1, offset)
            os.pwrite(fd, bytes([before[0] ^ 1 << random.randrange(8)]) if before else b"", offset)

    def close(self) -> None:
        """Free the memory."""
        for fd in self._memory.values():
            os.close(fd)
        self._memory.clear()


def _offset(image: bytes, slot: int) -> int:
    """What the record of a slot says of its place, whole or not."""
    start = slot * RECORD_BYTES + KEY_BYTES
    return int.from_bytes(image[start : start + 8], "little")


def detach(files: Files, file: Any) -> int:
    """``File.detach`` as this file system does it."""
    files.descriptions.remove(file)
    return files.give_fd(file)


_files.MemoryFile.detach = lambda self: detach(self._files, self)


class _Map(mmap.mmap):
    """A mapping whose end is noticed: whoever still has a view of it keeps it."""

    on_end: Any = None

    def __del__(self) -> None:
        if self.on_end is not None:
            self.on_end()


@dataclass(frozen=True, eq=False)
class Mapping:
    """Where a process sees a pool."""

    inode: int
    base: int
    size_bytes: int
    writer: int


class PoolMap:
    """In place of ``transfer.pool_map.PoolMap``: a mapping by the current process. Nobody cuts its file."""

    is_whole = True

    files: Files  # of the world that runs

    def __init__(self, fd: int, size_bytes: int) -> None:
        process: Process = check_alive()
        files = PoolMap.files
        description = files.keep(fd)
        (held,) = description.node.held[description]
        self.writer: int = held - WRITER_LOCK_BASE  # what the core knows this mapping by
        files.close_fd(fd)
        self.size_bytes = size_bytes
        self.populated_bytes = size_bytes
        self.inode: int = description.node.inode
        self.buffer = _Map(files.memory(description.node), size_bytes)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self.mapping = mapping = Mapping(self.inode, base, size_bytes, self.writer)
        files.mappings.append(mapping)
        held = [True]

        def end() -> None:
            if held:
                held.clear()
                files.mappings.remove(mapping)
                files.let_go(description)

        self.buffer.on_end = end
        process.at_exit.append(end)

    def populate(self, ready_bytes: int) -> bool:
        """Nothing to do."""
        return False


def pool_inode(files: Files, directory: str) -> int:
    """Inode of the pool file that is there."""
    return int(files.nodes[f"{directory}/{POOL}"].inode)


def real_os_close(fd: int) -> None:
    """``os.close`` of the modules under test."""
    files = PoolMap.files
    if fd >= _FIRST_FD:
        files.close_fd(fd)
    else:
        os.close(fd)


def now(kernel: Kernel) -> float:
    """Monotonic time of whoever runs."""
    return kernel.process.now() if kernel.process is not None else kernel.now
