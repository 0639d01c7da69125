"""The server's side of attaching: who knocks, what they want, and whether they may.

The socket lies where only its owner (or one group, when asked) can reach it, and the kernel tells who connected.
"""

from __future__ import annotations

import os
import socket
import struct
from dataclasses import dataclass, field

import msgspec

from lmcache.wire import framing
from lmcache.wire.messages import Attach, Attached, AttachRefused
from lmcache.wire.unix_listener import UnixListener, prepare_folder

VISITORS_MAX = 1024
"""Processes that may be attached, or on their way, at once."""

SPEAK_S = 2.0
"""Who has not said what it wants this long after connecting is dropped."""

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
        """Listen at ``path``.

        Raises:
            ConfigError: somebody listens there, or the path or its folder cannot be used.
        """
        prepare_folder(path, gid)
        self._gid = gid
        self._listener = UnixListener(path, gid)

    @property
    def path(self) -> str:
        """Where it lies."""
        return self._listener.path

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._listener.fileno()

    def accept(self, now: float) -> Visitor | None:
        """The next visitor, or None. Never waits. One who may not enter is let in to be told so."""
        connection = self._listener.accept()
        if connection is None:
            return None
        raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, peer_gid = _CREDENTIALS.unpack(raw)
        may_enter = uid == os.geteuid() or self._in_group(connection, peer_gid)
        return Visitor(connection, pid, uid, now + SPEAK_S, may_enter)

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
        self._listener.close()
