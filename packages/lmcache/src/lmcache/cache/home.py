"""The directory of one pool: finding it safe, locking it, adopting it or making it new, and removing it.

``<root>/<port>/pool`` and ``<root>/<port>/records``, where root is ``/dev/shm/lmcache-<uid>``. The lock on the
records file is held for the server's life; a directory whose lock is free belongs to no living server.
"""

from __future__ import annotations

import errno

from lmcache.errors import PoolError
from lmcache.system import File, FileInfo, Files

POOL = "pool"
RECORDS = "records"


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
        if file is not None and not is_ours(file.info(), self.files):
            file.close()
            return None
        return file

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
            PoolError: another server holds it.
        """
        file = self.open(RECORDS) or self.create(RECORDS)
        info = self.files.inspect(f"{self.path}/{RECORDS}") if file.lock() else None
        if info is None or info.inode != file.info().inode:
            file.close()
            raise PoolError(f"the pool in {self.path} is in use by another server")
        return file

    def remove(self) -> None:
        """Remove the files, then the directory if nothing else is in it, then the one above if no pool is left."""
        for path in (f"{self.path}/{POOL}", f"{self.path}/{RECORDS}", self.path, self.path.rpartition("/")[0]):
            try:
                self.files.remove(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY, errno.EACCES, errno.EPERM):
                    raise


def is_ours(info: FileInfo, files: Files) -> bool:
    """A regular file of this user, with one name and no rights for anybody else."""
    return info.kind == "file" and info.owner == files.user() and info.links == 1 and not info.mode & 0o077
