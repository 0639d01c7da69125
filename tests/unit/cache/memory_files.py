"""Files, time and randomness in memory, for the cache's tests: no real memory behind a pool, and death at any write."""

from __future__ import annotations

import errno
import os
import random
from dataclasses import dataclass, field

from lmcache.system import File, FileInfo, Space

USER = 1000


class Killed(BaseException):
    """The process died in this very write."""


class ManualClock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def now(self) -> float:
        return self.seconds


class SeededEntropy:
    """The same unpredictable bytes in every run."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)

    def token(self, num_bytes: int) -> bytes:
        return self._random.randbytes(num_bytes)


@dataclass(eq=False)
class Node:
    """An inode: what was written of it, how much memory exists, who locks it."""

    inode: int
    kind: str
    mode: int
    owner: int = USER
    links: int = 1
    data: bytearray = field(default_factory=bytearray)
    size_bytes: int = 0
    backed_bytes: int = 0
    locked_by: object = None
    held: dict[object, set[int]] = field(default_factory=dict)


class MemoryFile:
    """A description. ``files.die()`` ends all of the server's; detached ones live until ``files.exit(descriptor)``."""

    def __init__(self, files: MemoryFiles, node: Node) -> None:
        self._files = files
        self.node = node
        files.descriptions.append(self)

    def info(self) -> FileInfo:
        node = self.node
        return FileInfo(node.kind, node.inode, node.owner, node.mode, node.links, node.size_bytes)

    def read(self, num_bytes: int, offset: int) -> bytes:
        end = min(offset + num_bytes, self.node.size_bytes)
        return bytes(self.node.data[offset:end].ljust(max(0, end - offset), b"\0"))

    def write(self, data: bytes, offset: int) -> None:
        files = self._files
        survives = len(data)
        if files.writes_left is not None:
            files.writes_left -= 1
            if files.writes_left < 0:
                survives = min(files.torn_bytes, len(data))
        node = self.node
        node.data.extend(b"\0" * (offset + survives - len(node.data)))
        node.data[offset : offset + survives] = data[:survives]
        node.size_bytes = max(node.size_bytes, offset + survives)
        if files.writes_left is not None and files.writes_left < 0:
            raise Killed

    def resize(self, num_bytes: int) -> None:
        del self.node.data[num_bytes:]
        self.node.size_bytes = num_bytes

    def allocate(self, offset: int, num_bytes: int) -> None:
        more = max(0, offset + num_bytes - self.node.backed_bytes)
        if more > self._files.free_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._files.free_bytes -= more
        self.node.backed_bytes += more
        self.node.size_bytes = max(self.node.size_bytes, offset + num_bytes)

    def lock(self) -> bool:
        if self.node.locked_by not in (None, self):
            return False
        self.node.locked_by = self
        return True

    def hold_byte(self, offset: int) -> None:
        self.node.held.setdefault(self, set()).add(offset)

    def byte_is_held(self, offset: int) -> bool:
        return any(offset in offsets for holder, offsets in self.node.held.items() if holder is not self)

    def reopen(self) -> MemoryFile:
        return MemoryFile(self._files, self.node)

    def detach(self) -> int:
        self._files.descriptions.remove(self)
        self._files.detached.append(self)
        return len(self._files.detached) - 1

    def close(self) -> None:
        if self in self._files.descriptions:
            self._files.descriptions.remove(self)
            self.release()

    def release(self) -> None:
        """What the kernel does when the last reference to a description goes."""
        if self.node.locked_by is self:
            self.node.locked_by = None
        self.node.held.pop(self, None)


class MemoryFiles:
    """A file system of ``total_bytes``."""

    def __init__(self, total_bytes: int = 1 << 40) -> None:
        self.total_bytes = self.free_bytes = total_bytes
        self.nodes: dict[str, Node] = {}
        self.descriptions: list[MemoryFile] = []
        self.detached: list[MemoryFile] = []
        self.writes_left: int | None = None
        self.torn_bytes = 0
        self.boot = b"\1" * 16
        self._inodes = 1

    def kill_at(self, num_writes: int, torn_bytes: int) -> None:
        """Die in the write after ``num_writes`` more, of which only ``torn_bytes`` arrive."""
        self.writes_left, self.torn_bytes = num_writes, torn_bytes

    def die(self) -> None:
        """The server process is gone: its locks end, its files stay."""
        self.writes_left = None
        for description in list(self.descriptions):
            description.close()

    def exit(self, descriptor: int) -> None:
        """The process that was handed this descriptor is gone."""
        self.detached[descriptor].release()

    def user(self) -> int:
        return USER

    def boot_id(self) -> bytes:
        return self.boot

    def make_directory(self, path: str) -> None:
        if path not in self.nodes:
            self._add(path, "directory", 0o700)

    def inspect(self, path: str) -> FileInfo | None:
        node = self.nodes.get(path)
        return MemoryFile.info(_Closed(node)) if node else None  # type: ignore[arg-type]

    def open(self, path: str) -> File | None:
        node = self.nodes.get(path)
        return MemoryFile(self, node) if node else None

    def create(self, path: str) -> File:
        if path in self.nodes:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        return MemoryFile(self, self._add(path, "file", 0o600))

    def remove(self, path: str) -> None:
        if self.names(path):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        node = self.nodes.pop(path, None)
        if node:
            node.links -= 1
            self.free_bytes += node.backed_bytes

    def names(self, path: str) -> list[str]:
        return sorted(name.rpartition("/")[2] for name in self.nodes if name.rpartition("/")[0] == path)

    def space(self, path: str) -> Space:
        del path
        return Space(self.total_bytes, self.free_bytes)

    def _add(self, path: str, kind: str, mode: int) -> Node:
        self._inodes += 1
        node = self.nodes[path] = Node(self._inodes, kind, mode)
        return node


@dataclass
class _Closed:
    node: Node
