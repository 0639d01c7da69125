"""The folder of a file tier: ``BASE/1/AB/ABCD…``, one file an object, named by its key in hex. All of this blocks.

A file is written under another name in ``writing`` and then renamed, so under its own name it is always whole. It goes
past the page cache where the file system allows that (O_DIRECT). Nothing is synced: what was answered for survives the
death of this process, and what a power failure leaves half written shows in the header or in the checksums.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import itertools
import mmap
import os
import re
import stat
import threading
from collections.abc import Iterator, Sequence

from lmcache.errors import TierError
from lmcache.tiers import objects
from lmcache.tiers.file_io import FULL, Found, read_all, read_header, takes_direct, write_all

FOLDERS = tuple(f"{index:02x}" for index in range(256))
WRITING = "writing"
LOCK = ".lock"
_NAME = re.compile(r"[0-9a-f]{64}")


class Outcome(enum.Enum):
    """Of a read."""

    WHOLE = enum.auto()
    ABSENT = enum.auto()
    OTHER_LENGTH = enum.auto()


class Folder:
    """One folder, which one process uses at a time."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.is_direct = False
        self.is_closing = False  # set by any thread: ``look`` gives up
        self.generation = 0  # how often it had to be made anew, since somebody deleted it
        self._flags = os.O_NOFOLLOW
        self._root = self._lock_fd = -1
        self._numbers = itertools.count()
        self._publishing = threading.Lock()
        self._making = threading.Lock()

    def open(self) -> None:
        """Make what is missing, lock it, and remove what was being written when the last process died.

        Raises:
            TierError: another process uses it, or the file system refuses.
        """
        with self._sentence("use"):
            os.makedirs(self.path, 0o700, exist_ok=True)
            self._enter()
            try:
                for name in os.listdir(os.path.join(self._at(), WRITING)):
                    if name.isdigit():
                        self._unlink(f"{WRITING}/{name}")
                self.is_direct = takes_direct(self._root, f"{WRITING}/{next(self._numbers)}")
            except BaseException:  # else nobody would ever unlock it
                self.close()
                raise
            self._flags = os.O_NOFOLLOW | (os.O_DIRECT if self.is_direct else 0)

    def close(self) -> None:
        """Unlock."""
        for fd in (self._root, self._lock_fd):
            if fd >= 0:
                os.close(fd)
        self._root = self._lock_fd = -1

    def sizes(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of files, by name alone; 0 where there is none."""
        found = []
        for key in keys:
            try:
                about = os.stat(_name(key), dir_fd=self._root, follow_symlinks=False)
            except OSError:
                found.append(0)
            else:
                found.append(about.st_size if stat.S_ISREG(about.st_mode) else 0)
        return found

    def write(self, key: bytes, parts: Sequence[memoryview], victims: Sequence[bytes], reuse: bytes | None) -> bool:
        """Remove victims, then store an object; False where the file system is full.

        Args:
            reuse: a victim whose file becomes this object's. That is faster than freeing its blocks and allocating
                others (on ext4, each file removed in the last seconds slows the making of every new one). Nobody may
                be reading it.

        Raises:
            TierError: the file system refuses.
        """
        if victims:
            self.remove(victims)
        num_bytes = sum(map(len, parts))
        temporary = f"{WRITING}/{next(self._numbers)}"
        with self._sentence("write in"):
            for is_last in (False, True):
                try:
                    fd = self._reused(reuse, temporary, num_bytes) if reuse is not None else -1
                    if fd < 0:
                        fd = os.open(
                            temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | self._flags, 0o600, dir_fd=self._root
                        )
                    try:
                        write_all(fd, parts)
                    finally:
                        os.close(fd)
                    with self._publishing:
                        os.rename(temporary, _name(key), src_dir_fd=self._root, dst_dir_fd=self._root)
                    return True
                except OSError as error:
                    self._drop(temporary)
                    if error.errno in FULL:
                        return False
                    if is_last or not isinstance(error, FileNotFoundError):
                        raise
                    self._revive()
        raise AssertionError("unreachable")

    def read(self, key: bytes, parts: Sequence[memoryview], is_known: bool) -> Outcome:
        """Fill all parts from an object's file.

        Args:
            is_known: its length was that of the parts; a file that has another one now is removed.

        Raises:
            TierError: the file system refuses.
        """
        num_bytes = sum(map(len, parts))
        with self._sentence("read from"):
            try:
                fd = os.open(_name(key), os.O_RDONLY | os.O_NONBLOCK | self._flags, dir_fd=self._root)
            except FileNotFoundError:
                return Outcome.ABSENT
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                self.remove([key])  # a symbolic link, so none of ours
                return Outcome.ABSENT
            about = os.fstat(fd)
            broken: OSError | None = None
            try:
                if about.st_size != num_bytes and not is_known:
                    return Outcome.OTHER_LENGTH
                if about.st_size == num_bytes and read_all(fd, parts):
                    with contextlib.suppress(OSError):  # it only orders the objects after a restart
                        os.utime(fd)
                    return Outcome.WHOLE
            except OSError as error:  # a bad place on the disk costs the object, a broken disk is told
                if error.errno == errno.EFAULT:  # our buffer's memory is gone, which says nothing about the file
                    raise
                broken = error
            finally:
                os.close(fd)
            try:
                self._discard(_name(key), about)
            except OSError as error:
                raise broken or error from None
            return Outcome.ABSENT

    def remove(self, keys: Sequence[bytes]) -> None:
        """Remove objects; absent ones are fine.

        Raises:
            TierError: the file system refuses.
        """
        with self._sentence("remove from"):
            for key in keys:
                self._unlink(_name(key))

    def look(self, index: int) -> list[Found]:
        """What is in one of ``FOLDERS``, the longest unused first. What is no whole object is removed if it is named
        like one; other names are not ours.

        Raises:
            TierError: the folder cannot be read.
        """
        found: list[Found] = []
        page = mmap.mmap(-1, objects.header_bytes(objects.RANKS_MAX))
        with self._sentence("read"), memoryview(page) as buffer:
            try:
                fd = os.open(FOLDERS[index], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root)
            except FileNotFoundError:
                return []
            try:
                with os.scandir(fd) as entries:
                    names = [(entry.name, entry.is_file(follow_symlinks=False)) for entry in entries]
            finally:
                os.close(fd)
            for name, is_file in names:
                if self.is_closing:
                    break
                if not _NAME.fullmatch(name) or not name.startswith(FOLDERS[index]):
                    continue
                path = f"{FOLDERS[index]}/{name}"
                if not is_file:
                    self._unlink(path)
                elif item := self._inspect(path, bytes.fromhex(name), buffer):
                    found.append(item)
        page.close()
        found.sort()
        return found

    def _inspect(self, path: str, key: bytes, buffer: memoryview) -> Found | None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | self._flags, dir_fd=self._root)
        except FileNotFoundError:
            return None
        try:
            about = os.fstat(fd)
            header = read_header(fd, buffer)
        finally:
            os.close(fd)
        if header is None or header.key != key or header.num_bytes != about.st_size:
            self._discard(path, about)
            return None
        return about.st_mtime_ns, key, about.st_size, header.tenant

    def _discard(self, path: str, about: os.stat_result) -> None:
        """Remove a file unless another one has taken its place."""
        with self._publishing:
            try:
                now = os.stat(path, dir_fd=self._root, follow_symlinks=False)
            except FileNotFoundError:
                return
            if (now.st_ino, now.st_mtime_ns, now.st_size) == (about.st_ino, about.st_mtime_ns, about.st_size):
                self._unlink(path)

    def _unlink(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            os.unlink(path, dir_fd=self._root)

    def _drop(self, temporary: str) -> None:
        with contextlib.suppress(OSError):  # the error that brought us here is the one to tell
            os.unlink(temporary, dir_fd=self._root)

    def _reused(self, victim: bytes, temporary: str, num_bytes: int) -> int:
        """A victim's file under a temporary name, opened; -1 where it cannot serve."""
        try:
            os.rename(_name(victim), temporary, src_dir_fd=self._root, dst_dir_fd=self._root)
            fd = os.open(temporary, os.O_WRONLY | os.O_NONBLOCK | self._flags, dir_fd=self._root)
        except OSError:
            self._unlink(temporary)
            return -1
        try:
            about = os.fstat(fd)
            # a file with two names may be somebody's copy, made by linking: its bytes must stay
            is_ours = stat.S_ISREG(about.st_mode) and about.st_nlink == 1
            if is_ours and about.st_size > num_bytes:
                os.ftruncate(fd, num_bytes)
        except OSError:
            os.close(fd)
            raise
        if is_ours:
            return fd
        os.close(fd)
        self._unlink(temporary)
        return -1

    def _enter(self) -> None:
        """Open and lock the inner folder. Descriptors that exist keep their numbers: other threads may be using them.

        Raises:
            TierError: another process holds it, or somebody else may write there.
        """
        inner = self._at()
        with contextlib.suppress(FileExistsError):
            os.mkdir(inner, 0o700)
        with contextlib.ExitStack() as stack:
            root = os.open(inner, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            stack.callback(os.close, root)
            about = os.fstat(root)
            if about.st_uid != os.geteuid() or about.st_mode & 0o077:
                raise TierError(f"{inner} is open to others: it must belong to this user and have the mode 0700")
            lock = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=root)
            stack.callback(os.close, lock)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TierError(f"another server uses {self.path}") from None
            for name in (WRITING, *FOLDERS):
                _make_folder(name, root)
            self._root, self._lock_fd = _put_in_place(root, self._root), _put_in_place(lock, self._lock_fd)

    def _revive(self) -> None:
        """Make anew what somebody deleted."""
        with self._making:
            if os.fstat(self._root).st_nlink:
                for name in (WRITING, *FOLDERS):
                    _make_folder(name, self._root)
                return
            os.makedirs(self.path, 0o700, exist_ok=True)
            self._enter()
            self.generation += 1

    def _at(self) -> str:
        return os.path.join(self.path, str(objects.VERSION))

    @contextlib.contextmanager
    def _sentence(self, verb: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TierError(f"cannot {verb} {self.path}: {error.strerror or error}") from None


def _name(key: bytes) -> str:
    digits = key.hex()
    return f"{digits[:2]}/{digits}"


def _make_folder(name: str, parent: int) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=parent)


def _put_in_place(new: int, old: int) -> int:
    if old >= 0:
        return os.dup2(new, old, inheritable=False)
    return fcntl.fcntl(new, fcntl.F_DUPFD_CLOEXEC, 0)
