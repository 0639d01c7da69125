"""The outside world as small objects that are handed in: time, randomness, memory-backed files.

The cache and the server never call ``time``, ``os.urandom`` or file functions by themselves; a deterministic simulation
drives the very same code with its own clock and its own files.
"""

from __future__ import annotations

import fcntl
import functools
import os
import stat
import struct
import time
from dataclasses import dataclass
from typing import Protocol

from lmcache.errors import ConfigError


class Clock(Protocol):
    """Monotonic seconds; only differences mean anything."""

    def now(self) -> float: ...


class Entropy(Protocol):
    """Unpredictable bytes for ids that nobody may guess."""

    def token(self, num_bytes: int) -> bytes: ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        return time.monotonic()


class SystemEntropy:
    """The kernel's random generator."""

    def token(self, num_bytes: int) -> bytes:
        return os.urandom(num_bytes)


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What a file or directory is."""

    kind: str  # "file" | "directory" | "other"
    inode: int
    owner: int  # user id
    mode: int  # permission bits
    links: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Space:
    """Room of a file system."""

    total_bytes: int
    free_bytes: int


class File(Protocol):
    """One open file description. Every method may raise OSError."""

    def info(self) -> FileInfo: ...

    def read(self, num_bytes: int, offset: int) -> bytes:
        """Bytes from ``offset``; fewer only at the end of the file."""

    def write(self, data: bytes, offset: int) -> None:
        """All of ``data``, or OSError."""

    def resize(self, num_bytes: int) -> None: ...

    def allocate(self, offset: int, num_bytes: int) -> None:
        """Make the memory of a range exist, spread over NUMA nodes. Releases the GIL; OSError(ENOSPC) when full."""

    def lock(self) -> bool:
        """Lock the file for the life of this description; False when another description holds the lock."""

    def hold_byte(self, offset: int) -> None:
        """Shared lock on one byte for the life of this description, mappings made from it included."""

    def byte_is_held(self, offset: int) -> bool:
        """Whether another description, of any process, holds that byte."""

    def reopen(self) -> File:
        """A description of its own of the same file."""

    def detach(self) -> int:
        """The descriptor, whose closing becomes the caller's duty."""

    def close(self) -> None: ...


class Files(Protocol):
    """The memory-backed file system the pool lives on. Symbolic links are never followed."""

    def user(self) -> int: ...

    def boot_id(self) -> bytes:
        """16 bytes that change at every boot."""

    def make_directory(self, path: str) -> None:
        """Create with mode 0700; an existing one stays as it is."""

    def inspect(self, path: str) -> FileInfo | None: ...

    def open(self, path: str) -> File | None:
        """An existing file, for reading and writing; None when there is none."""

    def create(self, path: str) -> File:
        """A new file of mode 0600; OSError(EEXIST) when the name is taken."""

    def remove(self, path: str) -> None:
        """A file or an empty directory; a missing one is fine."""

    def names(self, path: str) -> list[str]: ...

    def space(self, path: str) -> Space: ...


_FLOCK = struct.Struct("@hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


def _info(status: os.stat_result) -> FileInfo:
    mode = status.st_mode
    kind = "file" if stat.S_ISREG(mode) else "directory" if stat.S_ISDIR(mode) else "other"
    return FileInfo(kind, status.st_ino, status.st_uid, stat.S_IMODE(mode), status.st_nlink, status.st_size)


class SystemFile:
    """A descriptor of the kernel."""

    def __init__(self, descriptor: int) -> None:
        self._fd = descriptor

    def info(self) -> FileInfo:
        return _info(os.fstat(self._fd))

    def read(self, num_bytes: int, offset: int) -> bytes:
        parts = []
        while num_bytes > 0 and (part := os.pread(self._fd, min(num_bytes, 1 << 30), offset)):
            parts.append(part)
            num_bytes -= len(part)
            offset += len(part)
        return b"".join(parts)

    def write(self, data: bytes, offset: int) -> None:
        written = os.pwrite(self._fd, data, offset)
        while written < len(data):
            written += os.pwrite(self._fd, memoryview(data)[written:], offset + written)

    def resize(self, num_bytes: int) -> None:
        os.ftruncate(self._fd, num_bytes)

    def allocate(self, offset: int, num_bytes: int) -> None:
        nodes = _numa_nodes()
        if len(nodes) < 2:
            os.posix_fallocate(self._fd, offset, num_bytes)
            return
        _set_memory_policy(_MPOL_INTERLEAVE, nodes)
        try:
            os.posix_fallocate(self._fd, offset, num_bytes)
        finally:
            _set_memory_policy(_MPOL_DEFAULT, [])

    def lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def hold_byte(self, offset: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0))

    def byte_is_held(self, offset: int) -> bool:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, offset, 1, 0)
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, question)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)

    def reopen(self) -> SystemFile:
        return SystemFile(os.open(f"/proc/self/fd/{self._fd}", os.O_RDWR | os.O_CLOEXEC))

    def detach(self) -> int:
        descriptor, self._fd = self._fd, -1
        return descriptor

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self.detach())


class SystemFiles:
    """The kernel's files (tmpfs in practice)."""

    def user(self) -> int:
        return os.geteuid()

    def boot_id(self) -> bytes:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))

    def make_directory(self, path: str) -> None:
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            return

    def inspect(self, path: str) -> FileInfo | None:
        try:
            return _info(os.lstat(path))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, path: str) -> SystemFile | None:
        try:
            return SystemFile(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK))
        except FileNotFoundError:
            return None

    def create(self, path: str) -> SystemFile:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL
        return SystemFile(os.open(path, flags, 0o600))

    def remove(self, path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError):
            os.rmdir(path)

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def space(self, path: str) -> Space:
        status = os.statvfs(path)
        return Space(status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize)


_MPOL_DEFAULT, _MPOL_INTERLEAVE = 0, 3
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}  # number of the system call; glibc has no wrapper


def read_private(path: str, named: str, bytes_max: int) -> bytes:
    """The content of a file that holds a secret; ``named`` begins the sentences about it.

    Raises:
        ConfigError: it is no plain file or too long, or others than its owner can use it, or its owner is neither this
            user nor root.
        OSError, ValueError: it cannot be opened or read.
    """
    # Not blocking: a pipe without a writer is refused below instead of waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ConfigError(f"{named} is no plain file")
        if found.st_mode & 0o077:
            raise ConfigError(f"{named} can be used by others than its owner: chmod 600 {path}")
        if found.st_uid not in (os.geteuid(), 0):
            raise ConfigError(f"{named} belongs to another user")
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(bytes_max + 1)
    finally:
        os.close(descriptor)
    if len(content) > bytes_max:
        raise ConfigError(f"{named} is longer than {bytes_max >> 10} KiB")
    return content


@functools.cache
def _numa_nodes() -> list[int]:
    """Nodes that have memory; empty where this kernel tells none or the system call's number is not known here."""
    if os.uname().machine not in _SET_MEMPOLICY:
        return []
    try:
        with open("/sys/devices/system/node/has_memory", encoding="ascii") as file:
            ranges = file.read().strip().split(",")
    except OSError:
        return []
    nodes: list[int] = []
    for part in filter(None, ranges):
        first, _, last = part.partition("-")
        nodes.extend(range(int(first), int(last or first) + 1))
    return nodes


def _set_memory_policy(policy: int, nodes: list[int]) -> None:
    """Memory policy of the calling thread. A refusal (in some containers) costs speed only, so it is ignored."""
    import ctypes

    words = [0] * (max(nodes, default=0) // 64 + 1)
    for node in nodes:
        words[node // 64] |= 1 << node % 64
    mask = (ctypes.c_uint64 * len(words))(*words)
    number = _SET_MEMPOLICY[os.uname().machine]
    ctypes.CDLL(None).syscall(number, policy, mask if nodes else None, len(words) * 64 + 1 if nodes else 0)
