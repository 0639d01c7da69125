"""A disk with a file system, behind the calls of ``os`` and ``fcntl`` that the file tier makes.

It can be full, refuse to read or write, do less than it was asked to, be slow or hang; and what lies on it can be
damaged. A process that is killed leaves behind what its calls had written so far.
"""

# ruff: noqa: ARG002 - signatures are those of what is stood in for
from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from .kernel import Kernel, Process, check_alive
from .network import Signal
from .strands import block, on_strand

USER = 1000
WRITE_STEP = 4096


@dataclass
class DiskFaults:
    """Probability of each, for one call."""

    read_error: float = 0.0
    write_error: float = 0.0
    short: float = 0.0
    slow: float = 0.0
    hang: float = 0.0


@dataclass(eq=False)
class _Node:
    inode: int
    is_folder: bool
    data: bytearray = field(default_factory=bytearray)
    links: int = 1
    used_ns: int = 0
    locked_by: object = None


@dataclass(eq=False)
class _Handle:
    node: _Node
    path: str
    process: Process


class Disk:
    """One file system; paths are absolute."""

    def __init__(self, kernel: Kernel) -> None:
        self.faults = DiskFaults()
        self.capacity_bytes = 1 << 40
        self.damaged: set[str] = set()  # names of files that somebody else changed
        self.num_refused_full = 0
        self._kernel = kernel
        self._inodes = 1
        self._next_fd = 3_000_000
        self._nodes: dict[str, _Node] = {"/": _Node(1, True)}
        self._handles: dict[int, _Handle] = {}
        self._known: set[Process] = set()

    def used_bytes(self) -> int:
        """Of all files with a name."""
        return sum(len(node.data) for node in self._nodes.values())

    def objects(self) -> list[str]:
        """Paths of the files that are objects."""
        return [path for path, node in self._nodes.items() if not node.is_folder and len(path.rpartition("/")[2]) == 64]

    # --- what the world does

    def damage(self) -> str | None:
        """Somebody or something changes a file: a bit, a page, the length, or it is another one's bytes."""
        paths = self.objects()
        if not paths:
            return None
        random = self._kernel.random
        path = random.choice(paths)
        data = self._nodes[path].data
        kind = random.choice(("bit", "page", "shorter", "longer", "other", "gone", "stale"))
        self.damaged.add(path.rpartition("/")[2])
        at = random.randrange(max(1, len(data)))
        if kind == "bit" and data:
            data[at] ^= 1 << random.randrange(8)
        elif kind == "page":
            data[at - at % WRITE_STEP : at - at % WRITE_STEP + WRITE_STEP] = bytes(min(WRITE_STEP, len(data)))
        elif kind == "shorter":
            del data[at:]
        elif kind == "longer":
            data += bytes(WRITE_STEP)
        elif kind == "other":
            data[:] = self._nodes[random.choice(paths)].data
        elif kind == "stale" and len(data) > 2 * WRITE_STEP:
            data[WRITE_STEP:] = data[WRITE_STEP:][::-1]
        elif kind == "gone":
            del self._nodes[path]
        return f"{kind} {path[-64:][:8]}"

    # --- calls

    def _at(self, path: str, dir_fd: int | None) -> str:
        if dir_fd is not None:
            path = f"{self._handle(dir_fd).path}/{path}"
        return "/" + path.strip("/")

    def _handle(self, fd: int) -> _Handle:
        handle = self._handles.get(fd)
        if handle is None:
            raise _error(errno.EBADF)
        return handle

    def _find(self, path: str) -> _Node:
        node = self._nodes.get(path)
        if node is None:
            raise _error(errno.ENOENT)
        return node

    def _pause(self, *, fails: float = 0.0) -> None:
        """Where others have their turn, and where calls fail."""
        check_alive()
        kernel, faults = self._kernel, self.faults
        if faults.hang and kernel.chance(faults.hang):
            seconds = kernel.random.uniform(2.0, 30.0)
            block(lambda: asyncio.sleep(seconds))
        elif kernel.chance(0.25):
            seconds = kernel.random.uniform(0.05, 1.0) if kernel.chance(faults.slow) else 0.0002
            block(lambda: asyncio.sleep(seconds))
        if fails and kernel.chance(fails):
            kernel.trace("disk: EIO")
            raise _error(errno.EIO)

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self._pause()
        where = self._at(path, dir_fd)
        node = self._nodes.get(where)
        if node is None:
            if not flags & os.O_CREAT:
                raise _error(errno.ENOENT)
            self._find(where.rpartition("/")[0])
            node = self._make(where, False)
        elif flags & os.O_EXCL:
            raise _error(errno.EEXIST)
        if flags & os.O_DIRECTORY and not node.is_folder:
            raise _error(errno.ENOTDIR)
        return self._new_fd(_Handle(node, where, check_alive()))

    def _make(self, path: str, is_folder: bool) -> _Node:
        self._inodes += 1
        node = self._nodes[path] = _Node(self._inodes, is_folder, used_ns=self._now_ns())
        return node

    def _new_fd(self, handle: _Handle) -> int:
        self._next_fd += 1
        self._handles[self._next_fd] = handle
        if handle.process not in self._known:
            self._known.add(handle.process)
            handle.process.at_exit.append(lambda: self._forget(handle.process))
        return self._next_fd

    def _forget(self, process: Process) -> None:
        for fd in [fd for fd, handle in self._handles.items() if handle.process is process]:
            self._close(fd)

    def close(self, fd: int) -> None:
        check_alive()
        self._handle(fd)
        self._close(fd)

    def _close(self, fd: int) -> None:
        handle = self._handles.pop(fd)
        if handle.node.locked_by is handle and handle not in self._handles.values():
            handle.node.locked_by = None

    def _about(self, node: _Node) -> SimpleNamespace:
        kind = stat.S_IFDIR | 0o700 if node.is_folder else stat.S_IFREG | 0o600
        return SimpleNamespace(
            st_mode=kind, st_size=len(node.data), st_ino=node.inode, st_mtime_ns=node.used_ns, st_uid=USER,
            st_nlink=node.links,
        )  # fmt: skip

    def stat(self, path: str, *, dir_fd: int | None = None, follow_symlinks: bool = True) -> SimpleNamespace:
        self._pause()
        return self._about(self._find(self._at(path, dir_fd)))

    def fstat(self, fd: int) -> SimpleNamespace:
        check_alive()
        return self._about(self._handle(fd).node)

    def listdir(self, path: str) -> list[str]:
        self._pause()
        where = self._at(path, None)
        self._find(where)
        return [name for other in self._nodes for head, _, name in (other.rpartition("/"),) if head == where]

    @contextmanager
    def scandir(self, fd: int) -> Iterator[list[SimpleNamespace]]:
        names = self.listdir(self._handle(fd).path)
        yield [SimpleNamespace(name=name) for name in names]

    def mkdir(self, path: str, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        check_alive()
        where = self._at(path, dir_fd)
        if where in self._nodes:
            raise _error(errno.EEXIST)
        self._make(where, True)

    def makedirs(self, path: str, mode: int = 0o777, exist_ok: bool = False) -> None:
        check_alive()
        parts = path.strip("/").split("/")
        for end in range(1, len(parts) + 1):
            where = "/" + "/".join(parts[:end])
            if where not in self._nodes:
                self._make(where, True)

    def rename(self, path: str, to: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        self._pause()
        source, target = self._at(path, src_dir_fd), self._at(to, dst_dir_fd)
        node = self._find(source)
        self._find(target.rpartition("/")[0])
        del self._nodes[source]
        if target in self._nodes:
            self._nodes[target].links = 0
        self._nodes[target] = node
        self.damaged.discard(target.rpartition("/")[2])

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        self._pause()
        where = self._at(path, dir_fd)
        node = self._find(where)
        if node.is_folder:
            raise _error(errno.EISDIR)
        node.links = 0
        del self._nodes[where]

    def ftruncate(self, fd: int, num_bytes: int) -> None:
        check_alive()
        del self._handle(fd).node.data[num_bytes:]

    def utime(self, fd: int) -> None:
        self._pause()
        self._handle(fd).node.used_ns = self._now_ns()

    def _now_ns(self) -> int:
        return int(self._kernel.now * 1e9) + self._kernel.steps % 1000

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        return self.pwritev(fd, [memoryview(bytes(data))], offset)  # an error holds no view of the caller's

    def pwritev(self, fd: int, parts: Sequence[memoryview], offset: int) -> int:
        node, done = self._handle(fd).node, 0
        is_short = self._kernel.chance(self.faults.short)
        for part in parts:
            for at in range(0, len(part), WRITE_STEP):
                self._pause(fails=self.faults.write_error)
                step = bytes(part[at : at + WRITE_STEP])
                end = offset + done + len(step)
                if end > len(node.data) and self.used_bytes() + end - len(node.data) > self.capacity_bytes:
                    if done:
                        return done
                    self.num_refused_full += 1
                    raise _error(errno.ENOSPC)
                if end > len(node.data):
                    node.data.extend(bytes(end - len(node.data)))
                node.data[offset + done : end] = step
                node.used_ns = self._now_ns()
                done += len(step)
                if is_short:
                    return done
        return done

    def preadv(self, fd: int, parts: Sequence[memoryview], offset: int) -> int:
        node, done = self._handle(fd).node, 0
        is_short = self._kernel.chance(self.faults.short)
        for part in parts:
            for at in range(0, len(part), WRITE_STEP):
                self._pause(fails=self.faults.read_error)
                step = node.data[offset + done : offset + done + min(WRITE_STEP, len(part) - at)]
                part[at : at + len(step)] = step
                done += len(step)
                if is_short or len(step) < min(WRITE_STEP, len(part) - at):
                    return done
        return done

    def dup2(self, fd: int, fd2: int, inheritable: bool = True) -> int:
        check_alive()
        self._close(fd2)
        self._handles[fd2] = self._handle(fd)
        return fd2

    def flock(self, fd: int, operation: int) -> None:
        check_alive()
        handle = self._handle(fd)
        if handle.node.locked_by not in (None, handle):
            raise BlockingIOError(errno.EWOULDBLOCK, "locked")
        handle.node.locked_by = handle

    def dup_fd(self, fd: int, command: int, argument: int) -> int:
        check_alive()
        assert command == fcntl.F_DUPFD_CLOEXEC
        return self._new_fd(self._handle(fd))


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class _Lock:
    """A lock between strands."""

    def __init__(self) -> None:
        self._is_held = False
        self._changed = Signal()

    def __enter__(self) -> None:
        if self._is_held:
            block(lambda: self._changed.wait(None, lambda: not self._is_held))
        self._is_held = True

    def __exit__(self, *_: object) -> None:
        self._is_held = False
        self._changed.set()


class _Threads:
    """In place of ``tiers.file_threads.Threads``: so many strands at a time."""

    def __init__(self, count: int, name: str) -> None:
        del name
        self._free = count
        self._changed = Signal()
        self._num_open = 0
        self._calls: set[asyncio.Task[None]] = set()

    def run(self, work: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._num_open += 1

        async def call() -> None:
            await self._changed.wait(None, lambda: self._free > 0)
            self._free -= 1
            try:
                result = await on_strand(work, *args)
            except Exception as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)
            finally:
                self._free += 1
                self._num_open -= 1
                self._changed.set()

        task = loop.create_task(call())
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        return future

    async def close(self, wait_s: float) -> bool:
        return await self._changed.wait(wait_s, lambda: not self._num_open)


def disk_standins(disk: Disk) -> dict[str, Any]:
    """What stands for ``os``, ``fcntl``, ``threading`` and ``Threads`` in the modules of the file tier."""
    constants = {name: getattr(os, name) for name in dir(os) if name.startswith("O_")}
    calls = {name: getattr(disk, name) for name in dir(disk) if not name.startswith("_")}
    system = SimpleNamespace(**constants, **calls, path=os.path, geteuid=lambda: USER, stat_result=os.stat_result)
    locks = {name: getattr(fcntl, name) for name in dir(fcntl) if name.isupper()}
    return {
        "os": system,
        "fcntl": SimpleNamespace(**locks, flock=disk.flock, fcntl=disk.dup_fd),
        "threading": SimpleNamespace(Lock=_Lock),
        "Threads": _Threads,
    }
