"""Which names of which modules are replaced while a world runs, and by what."""

# ruff: noqa: ARG002, ARG005 - signatures are those of what is stood in for
from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lmcache.cascade.line as cascade_line
import lmcache.cascade.promoting as promoting
import lmcache.connectors.copier as copier
import lmcache.connectors.link as link
import lmcache.server.core as core
import lmcache.tiers.file as file
import lmcache.tiers.file_folder as file_folder
import lmcache.tiers.file_io as file_io
import lmcache.wire.async_client as async_client
import lmcache.wire.attach as attach
import lmcache.wire.client as client
import lmcache.wire.stream as stream
import lmcache.wire.tcp as tcp
from lmcache.cache import extents, opening
from lmcache.errors import AttachError
from lmcache.wire import framing
from lmcache.wire.attach import Attachment
from lmcache.wire.messages import Attach, AttachRefused, AttachReply

from . import memory
from .disk import Disk, disk_standins
from .kernel import Kernel, Process, check_alive
from .network import Network, Signal, zmq_standin
from .sockets import READABLE, WRITABLE, Poll, StreamEnd, Unix, open_connection
from .strands import block, on_strand

PIECE_BYTES = 16 * 4096
FOLDERS = ("00", "01", "02", "03")
"""Of a file tier: fewer than it has, so that looking through them takes few steps. Keys begin accordingly."""


class _Event:
    def __init__(self) -> None:
        self._is_set = False
        self._changed = Signal()

    def set(self) -> None:
        self._is_set = True
        self._changed.set()

    def is_set(self) -> bool:
        return self._is_set

    def wait(self, timeout: float | None = None) -> bool:
        return bool(block(lambda: self._changed.wait(timeout, lambda: self._is_set)))


class _Thread:
    """A strand of the process that starts it."""

    def __init__(self, target: Callable[[], object], name: str = "", daemon: bool = False) -> None:
        self._target = target
        self._task: Any = None

    def start(self) -> None:
        self._task = check_alive().spawn(on_strand(self._target))

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done()

    def join(self, timeout: float | None = None) -> None:
        changed = Signal()
        self._task.add_done_callback(lambda _: changed.set())
        block(lambda: changed.wait(timeout, self._task.done))


class _Queue:
    def __init__(self, maxsize: int = 0) -> None:
        self._items: deque[Any] = deque()
        self._max = maxsize
        self._changed = Signal()

    def __class_getitem__(cls, item: object) -> type[_Queue]:
        return cls

    def put_nowait(self, item: object) -> None:
        if 0 < self._max <= len(self._items):
            raise queue.Full
        self._items.append(item)
        self._changed.set()

    def qsize(self) -> int:
        return len(self._items)

    def empty(self) -> bool:
        return not self._items

    def get_nowait(self) -> Any:
        if not self._items:
            raise queue.Empty
        return self._items.popleft()

    def get(self, block_: bool = True, timeout: float | None = None) -> Any:
        if not self._items:
            block(lambda: self._changed.wait(timeout, lambda: bool(self._items)))
        return self.get_nowait()


class Knocking:
    """The attach socket of a core: who has connected and was not accepted yet."""

    def __init__(self) -> None:
        self.waiting: deque[Unix] = deque()


class Standins:
    """Makes the replacements for one world. ``doors``: attach sockets by path."""

    def __init__(
        self, kernel: Kernel, network: Network, files: memory.Files, disk: Disk, server: Callable[[], Process]
    ) -> None:
        self._kernel = kernel
        self._network = network
        self._files = files
        self._disk = disk
        self._server = server
        self.doors: dict[str, Knocking] = {}

    def attach(self, path: str, request: Attach, timeout_s: float) -> Attachment:
        """``wire.attach.attach`` over a simulated socket."""
        process = check_alive()
        door = self.doors.get(path)
        if door is None:
            raise AttachError(f"nobody listens at {path}")
        ours, theirs = Unix.pair(self._kernel, process, self._server())
        door.waiting.append(theirs)
        theirs.process.has_news = True
        ours.send(framing.pack(request))
        deadline = process.now() + timeout_s
        while (reply := framing.unpack(ours.data, _decoder)) is None:
            left_s = deadline - process.now()
            if left_s <= 0 or ours.is_over:
                ours.close()
                raise AttachError(f"the server at {path} did not answer")
            have = len(ours.data)
            block(lambda: ours.changed.wait(left_s, lambda: len(ours.data) > have or ours.is_over))  # noqa: B023
        ours.data.clear()
        if isinstance(reply, AttachRefused):
            ours.close()
            raise AttachError(reply.message)
        return Attachment(reply, ours.fds.pop(0) if request.want_pool else None, ours)  # type: ignore[arg-type]

    def _socketpair(self) -> tuple[Unix, Unix]:
        process = check_alive()
        return Unix.pair(self._kernel, process, process, delay=False)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Put all in place, and back."""
        kernel = self._kernel
        time = SimpleNamespace(monotonic=lambda: memory.now(kernel), sleep=lambda seconds: None)
        threads = SimpleNamespace(Lock=threading.Lock, Event=_Event, Thread=_Thread)
        queues = SimpleNamespace(Queue=_Queue, Full=queue.Full, Empty=queue.Empty)
        system = SimpleNamespace(
            close=memory.real_os_close,
            geteuid=os.geteuid,
            getpid=os.getpid,
            path=os.path,
            cpu_count=lambda: 2,
            sched_setaffinity=lambda *_: None,
        )
        sockets = SimpleNamespace(socketpair=self._socketpair, socket=Unix)
        clients = SimpleNamespace(
            socket=lambda family, kind: StreamEnd(self._network, check_alive()),
            AF_UNIX=socket.AF_UNIX,
            SOCK_STREAM=socket.SOCK_STREAM,
        )
        polls = SimpleNamespace(poll=Poll, POLLIN=READABLE, POLLOUT=WRITABLE)
        zmq = zmq_standin(self._network)
        disk = disk_standins(self._disk)
        replaced: list[tuple[Any, dict[str, Any]]] = [
            (tcp, {"zmq": zmq, "_listen": lambda _: _Port()}),
            (client, {"socket": clients, "time": time}),
            (stream, {"select": polls, "time": time}),
            (async_client, {"open_unix_connection": lambda path: open_connection(self._network, path)}),
            (attach, {"os": system}),
            (core, {"os": system}),
            (link, {"threading": threads, "select": polls, "socket": sockets}),
            (link, {"os": system, "attach": self.attach, "PoolMap": memory.PoolMap}),
            (copier, {"threading": threads, "queue": queues, "time": time, "os": system}),
            (cascade_line, {"attach": self.attach, "PoolMap": memory.PoolMap, "os": system}),
            (promoting, {"page_view": _page_view}),
            (file, {"time": time, "Threads": disk["Threads"], "FOLDERS": FOLDERS}),
            (file_folder, {name: disk[name] for name in ("os", "fcntl", "threading")}),
            (file_folder, {"FOLDERS": FOLDERS}),
            (file_io, {"os": disk["os"], "time": time}),
            (opening, {"PIECE_BYTES": PIECE_BYTES}),
        ]
        defaults = extents.Extents.__init__.__defaults__
        former, memory.PoolMap.files = getattr(memory.PoolMap, "files", None), self._files
        was_disabled = logging.root.manager.disable
        with contextlib.ExitStack() as stack:
            for module, names in replaced:
                for name, value in names.items():
                    stack.enter_context(mock.patch.object(module, name, value))
            extents.Extents.__init__.__defaults__ = (PIECE_BYTES,)
            logging.disable(logging.CRITICAL)
            try:
                yield
            finally:
                logging.disable(was_disabled)
                extents.Extents.__init__.__defaults__ = defaults
                memory.PoolMap.files = former  # type: ignore[assignment]


class _Port:
    """Stands for the listening socket of a tcp door."""

    def dup(self) -> _Port:
        return self

    def detach(self) -> int:
        return -1

    def close(self) -> None:
        pass


def _page_view(num_bytes: int) -> memoryview:
    return memoryview(bytearray(num_bytes))


def _make_decoder() -> Any:
    import msgspec

    return msgspec.msgpack.Decoder(AttachReply)


_decoder = _make_decoder()


def fingerprint(data: bytes | bytearray | memoryview) -> int:
    """A short number for traces."""
    return zlib.crc32(data)
