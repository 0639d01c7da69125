"""A unix stream socket that listens at a path: its folder, its file, and who is let in when descriptors run out."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from lmcache.errors import ConfigError

_PATH_BYTES_MAX = 100  # the kernel allows 107, and the socket beside the attach socket has a longer name
_BACKLOG = 128


class UnixListener:
    """Listens at ``path``. The file is its owner's only, or one group's."""

    def __init__(self, path: str, gid: int | None) -> None:
        """A socket file that nobody listens at any more is replaced.

        Raises:
            ConfigError: somebody listens there, or the path cannot be used.
        """
        _remove_stale(path)
        self.path = path
        self._spare_fd: int | None = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        former = os.umask(0o177)  # process-wide: listeners are made before there are threads
        try:
            self._socket.bind(path)
            share(path, gid)
            self._socket.listen(_BACKLOG)
        except OSError as error:
            self._socket.close()
            self._close_spare()
            raise ConfigError(f"cannot make the socket {path}: {error.strerror}") from None
        finally:
            os.umask(former)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def accept(self) -> socket.socket | None:
        """The next connection, or None. Never waits."""
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return None
        connection.setblocking(False)
        return connection

    def _turn_away(self) -> None:
        """Out of descriptors: hang up on the next in line, who would else keep this socket ready for ever."""
        self._close_spare()
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            connection.close()
        with contextlib.suppress(OSError):  # somebody else may take the last one; the next time tries again
            self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _close_spare(self) -> None:
        spare_fd, self._spare_fd = self._spare_fd, None
        if spare_fd is not None:
            os.close(spare_fd)

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        self._socket.close()
        self._close_spare()
        with contextlib.suppress(OSError):
            os.unlink(self.path)


def prepare_folder(path: str, gid: int | None) -> None:
    """Make the folder of ``path`` if it is missing, and refuse one that others could have prepared.

    Raises:
        ConfigError: a link, another owner, or writable by others.
    """
    folder = os.path.dirname(path) or "."
    if len(os.fsencode(path)) > _PATH_BYTES_MAX:
        raise ConfigError(f"the attach path {path} is longer than {_PATH_BYTES_MAX} bytes: set a shorter --attach-path")
    try:
        os.mkdir(folder, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(f"cannot make the folder of the attach socket {folder}: {error.strerror}") from None
    else:
        if gid is not None:
            os.chown(folder, -1, gid)
            os.chmod(folder, 0o710)
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"the folder of the attach socket {folder} is a link or no folder")
    shared = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
    if shared or found.st_uid not in (os.geteuid(), 0):
        raise ConfigError(f"the folder of the attach socket {folder} belongs to another user or is writable by others")


def share(path: str, gid: int | None) -> None:
    """Open a socket file to one group."""
    if gid is not None:
        os.chown(path, -1, gid)
        os.chmod(path, 0o660)


def _remove_stale(path: str) -> None:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"{path} exists and is no socket: choose another --attach-path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise ConfigError(f"cannot tell who listens at {path}: {error.strerror or error}") from None
    raise ConfigError(f"another server listens at {path}: stop it, or choose another --port or --attach-path")
