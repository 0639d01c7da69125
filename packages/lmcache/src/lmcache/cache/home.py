"""The directory of one pool: finding it safe, locking it, adopting it or making it new, and removing it.

``<root>/<instance>/pool`` and ``<root>/<instance>/records``, where root is ``/dev/shm/lmcache-<uid>`` and the name of
the instance is the server's port unless it was given one. The lock on the records file is held for the server's life; a
directory whose lock is free belongs to no living server.
"""

from __future__ import annotations

import errno
import re

from lmcache.errors import ConfigError, PoolBusy, PoolError
from lmcache.system import File, FileInfo, Files

POOL = "pool"
RECORDS = "records"

_INSTANCE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")


def check_instance(name: str) -> str:
    """The name of an instance as it was given, which is safe as the name of a directory.

    Raises:
        ConfigError: it is not.
    """
    if not _INSTANCE.fullmatch(name):
        raise ConfigError(
            f"{name[:80]!r} cannot be the name of an instance: that is 1 to 64 letters, digits, '-', '_' and '.', "
            "without a '.' in front"
        )
    return name


class Home:
    """One pool's directory."""

    def __init__(self, files: Files, path: str) -> None:
        self.files = files
        self.path = path

    def prepare(self) -> None:
        """Create the directory and the one above it, or see that they are ours and closed to everybody else.

        Raises:
            PoolError: somebody else owns or can enter one of them, or it cannot be made.
        """
        for path in (self.path.rpartition("/")[0], self.path):
            try:
                self.files.make_directory(path)
            except OSError as error:
                raise PoolError(f"cannot create {path}: {error.strerror}") from error
            info = self.files.inspect(path)
            if info is None or info.kind != "directory" or info.owner != self.files.user() or info.mode & 0o077:
                raise PoolError(f"{path} is not a directory of this user alone (mode 0700): remove or rename it")

    def open(self, name: str) -> File | None:
        """One of the files, if it is there and nobody else can have a hand in it; a suspicious one is None."""
        try:
            file = self.files.open(f"{self.path}/{name}")
        except OSError:  # a link, a socket, no permission
            return None
        if file is not None and distrust(file.info(), self.files):
            file.close()
            return None
        return file

    def distrust(self, name: str) -> str | None:
        """Why ``open`` does not take the file of that name, for people; None where it does, or there is none."""
        info = self.files.inspect(f"{self.path}/{name}")
        return distrust(info, self.files) if info else None

    def create(self, name: str) -> File:
        """One of the files, new, in place of whatever had its name.

        Raises:
            PoolError: it cannot be made.
        """
        path = f"{self.path}/{name}"
        try:
            self.files.remove(path)
            return self.files.create(path)
        except OSError as error:
            raise PoolError(f"cannot create {path}: {error.strerror}") from error

    def lock(self) -> File:
        """The records file, locked; new where there was none to be trusted.

        Raises:
            PoolBusy: another server holds it.
        """
        file = self.open(RECORDS) or self.create(RECORDS)
        info = self.files.inspect(f"{self.path}/{RECORDS}") if file.lock() else None
        if info is None or info.inode != file.info().inode:
            file.close()
            raise PoolBusy(f"the pool in {self.path} is in use by another server")
        return file

    def remove(self) -> None:
        """Remove the files, then the directory if nothing else is in it, then the one above if no pool is left."""
        for path in (f"{self.path}/{POOL}", f"{self.path}/{RECORDS}", self.path, self.path.rpartition("/")[0]):
            try:
                self.files.remove(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.EACCES, errno.EPERM):
                    raise


def distrust(info: FileInfo, files: Files) -> str | None:
    """Why a file is not a regular one of this user, with one name and no rights for anybody else; None where it is."""
    if info.kind != "file":
        return "is not a regular file"
    if info.owner != files.user():
        return f"belongs to user {info.owner}, this server runs as {files.user()}"
    if info.mode & 0o077:
        return f"has mode {info.mode:04o}, not 0600"
    return f"has {info.links} names, not 1" if info.links != 1 else None
