"""The server's side of attaching: who knocks, what they want, and whether they may.

The socket lies where only its owner (or one group, when asked) can reach it, and the kernel tells who connected.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from lmcache.errors import ConfigError
from lmcache.wire import framing
from lmcache.wire.messages import Attach, Attached, AttachRefused

VISITORS_MAX = 1024
"""Processes that may be attached, or on their way, at once."""

SPEAK_S = 2.0
"""Who has not said what it wants this long after connecting is dropped."""

_PATH_BYTES_MAX = 100  # the kernel allows 107, and the zmq endpoint beside the socket has a longer name
_SO_PEERGROUPS = 59
_CREDENTIALS = struct.Struct("=iii")
_requests: msgspec.msgpack.Decoder[Attach] = msgspec.msgpack.Decoder(Attach)


def default_path(rpc_port: int, gid: int | None) -> str:
    """Where the attach socket of the server on ``rpc_port`` lies: the user's runtime folder, else one under /tmp.

    A group that shares it needs a folder of its own: the runtime folder is closed to everybody else.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if gid is not None:
        folder = f"/tmp/lmcache-{os.geteuid()}-{gid}"
    elif runtime and os.path.isdir(runtime):
        folder = os.path.join(runtime, "lmcache")
    else:
        folder = f"/tmp/lmcache-{os.geteuid()}"
    return os.path.join(folder, f"{rpc_port}.sock")


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


@dataclass
class Visitor:
    """One process at the door, by the kernel's word: ``pid`` is 0 when it lives where we cannot see it."""

    socket: socket.socket
    pid: int
    uid: int
    deadline: float
    may_enter: bool
    data: bytearray = field(default_factory=bytearray)

    def read(self) -> Attach | None:
        """What it asks for, once that is complete. Never waits.

        Raises:
            EOFError: it is gone.
            WireError: it does not speak our language.
        """
        room = framing.LENGTH_BYTES + framing.ATTACH_BYTES_MAX + 1 - len(self.data)
        try:
            part = self.socket.recv(room)
        except BlockingIOError:
            return None
        except OSError:
            raise EOFError from None
        if not part:
            raise EOFError
        self.data += part
        return framing.unpack(self.data, _requests)

    def answer(self, reply: Attached | AttachRefused, pool_fd: int | None = None) -> bool:
        """Send the one answer, with the pool if it is given; False when the visitor is gone."""
        frame = framing.pack(reply)
        try:
            if pool_fd is None:
                return self.socket.send(frame, socket.MSG_NOSIGNAL) == len(frame)
            return socket.send_fds(self.socket, [frame], [pool_fd], socket.MSG_NOSIGNAL) == len(frame)
        except OSError:
            return False

    def gone(self) -> bool:
        """Whether an attached process ended (or broke the rule that it says nothing more). Never waits."""
        try:
            self.socket.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def close(self) -> None:
        """Show it out."""
        self.socket.close()


class Door:
    """The listening attach socket."""

    def __init__(self, path: str, gid: int | None = None) -> None:
        """Listen at ``path``; a socket file that nobody listens at any more is replaced.

        Raises:
            ConfigError: somebody listens there, or the path cannot be used.
        """
        prepare_folder(path, gid)
        _remove_stale(path)
        self.path = path
        self._gid = gid
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        try:
            with private_umask():
                self._socket.bind(path)
            share(path, gid)
            self._socket.listen(128)
        except OSError as error:
            self._socket.close()
            raise ConfigError(f"cannot make the attach socket {path}: {error.strerror}") from None

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def accept(self, now: float) -> Visitor | None:
        """The next visitor, or None. Never waits. One who may not enter is let in to be told so."""
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return None
        connection.setblocking(False)
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, peer_gid = _CREDENTIALS.unpack(raw)
        may_enter = uid == os.geteuid() or self._in_group(connection, peer_gid)
        return Visitor(connection, pid, uid, now + SPEAK_S, may_enter)

    def _turn_away(self) -> None:
        """Out of descriptors: hang up on the next in line, who would else keep this socket ready for ever."""
        os.close(self._spare_fd)
        with contextlib.suppress(OSError):
            connection, _ = self._socket.accept()
            connection.close()
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _in_group(self, connection: socket.socket, peer_gid: int) -> bool:
        if self._gid is None:
            return False
        if peer_gid == self._gid:
            return True
        try:
            raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
        except OSError:
            return False
        return self._gid in struct.unpack(f"={len(raw) // 4}I", raw)

    def close(self) -> None:
        """Stop listening and remove the socket file."""
        self._socket.close()
        os.close(self._spare_fd)
        with contextlib.suppress(OSError):
            os.unlink(self.path)


@contextlib.contextmanager
def private_umask() -> Iterator[None]:
    """Files made inside are for their owner only. Process-wide: for start-up, before there are threads."""
    before = os.umask(0o177)
    try:
        yield
    finally:
        os.umask(before)


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
