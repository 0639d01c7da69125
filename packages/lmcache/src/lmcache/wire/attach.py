"""A client's side of attaching: one unix stream socket that hands out the pool and whose end is a death."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from array import array
from dataclasses import dataclass

import msgspec

from lmcache.errors import AttachError, WireError
from lmcache.wire import framing
from lmcache.wire.messages import Attach, Attached, AttachRefused, AttachReply

_replies: msgspec.msgpack.Decoder[AttachReply] = msgspec.msgpack.Decoder(AttachReply)


@dataclass
class Attachment:
    """What a successful attach gave. The server takes the end of ``socket`` for the death of this process.

    ``pool_fd`` is owned by this object until the caller sets it to None after taking it over.
    """

    reply: Attached
    pool_fd: int | None
    socket: socket.socket

    def alive(self) -> bool:
        """Whether the server still holds its end. Never waits."""
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Detach: the server frees everything this process held. May be called twice."""
        self.socket.close()
        if self.pool_fd is not None:
            os.close(self.pool_fd)
            self.pool_fd = None


def attach(path: str, request: Attach, timeout_s: float) -> Attachment:
    """Attach to the server that listens at ``path``.

    Raises:
        AttachError: refused, nobody there, no permission, no answer in time, or not our server: a sentence says which.
    """
    deadline = time.monotonic() + timeout_s
    conversation = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    fds: list[int] = []
    try:
        reply = _converse(conversation, path, request, deadline, fds)
        if request.want_pool and not fds:
            raise AttachError(f"the server at {path} sent no pool")
        pool_fd = fds.pop(0) if request.want_pool else None
        conversation.setblocking(False)
        return Attachment(reply, pool_fd, conversation)
    except TimeoutError:
        conversation.close()
        raise AttachError(f"the server at {path} did not answer within {timeout_s:g} s") from None
    except OSError as error:
        conversation.close()
        raise AttachError(_explain(path, error)) from None
    except (AttachError, WireError) as error:
        conversation.close()
        raise AttachError(str(error)) from None
    finally:
        for fd in fds:
            with contextlib.suppress(OSError):
                os.close(fd)


def _converse(talk: socket.socket, path: str, request: Attach, deadline: float, fds: list[int]) -> Attached:
    """Send the one frame, read the one answer; received descriptors are appended to ``fds``."""
    _limit(talk, deadline)
    talk.connect(path)
    _limit(talk, deadline)
    with contextlib.suppress(BrokenPipeError):  # it hung up on us, perhaps after a word: read on
        talk.sendall(framing.pack(request))
    data = bytearray()
    while (reply := framing.unpack(data, _replies)) is None:
        _limit(talk, deadline)
        # Exactly what is missing, so that nothing of a later frame is swallowed; close-on-exec from the first moment.
        missing = framing.LENGTH_BYTES - len(data)
        if missing <= 0:
            missing = int.from_bytes(data[: framing.LENGTH_BYTES], "little") + framing.LENGTH_BYTES - len(data)
        part = _receive(talk, missing, fds)
        if not part:
            raise AttachError(f"the server at {path} closed the connection without an answer")
        data += part
    if isinstance(reply, AttachRefused):
        raise AttachError(reply.message)
    return reply


def _receive(talk: socket.socket, num_bytes: int, fds: list[int]) -> bytes:
    # Not socket.recv_fds: it ignores the flags it is given.
    size = array("i", [0]).itemsize
    part, ancillary, _, _ = talk.recvmsg(num_bytes, socket.CMSG_LEN(size), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            received = array("i")
            received.frombytes(data[: len(data) - len(data) % size])
            fds.extend(received)
    return part


def _limit(talk: socket.socket, deadline: float) -> None:
    left_s = deadline - time.monotonic()
    if left_s <= 0:
        raise TimeoutError
    talk.settimeout(left_s)


def _explain(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no server has its attach socket at {path}: is it on this host, and can this container see that path?"
    if isinstance(error, ConnectionRefusedError):
        return f"nobody listens at {path} any more: the server that made it is gone"
    if isinstance(error, PermissionError):
        return f"this user may not use {path}: start the server as the same user, or with --attach-group"
    return f"cannot attach at {path}: {error.strerror or error}"
