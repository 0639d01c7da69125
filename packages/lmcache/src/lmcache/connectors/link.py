"""Keeps one engine process attached to its server: attaches, notices the end at once, attaches again, waits for nobody.

A *line* is one attachment that stands: the conversation with the core, the socket whose end is the server's death, and
(for a worker) the mapped pool. The link makes lines on a thread of its own and publishes the current one; whoever uses
a line finds it replaced by None the moment it ends. Everything that can hang (connecting, the two greetings) happens
here, under deadlines, so that no engine thread ever waits for an attach.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass

from lmcache.errors import AttachError, LMCacheError, PeerRefused, PeerSilent, WireError
from lmcache.transfer.pool_map import PoolMap
from lmcache.wire.attach import Attachment, attach
from lmcache.wire.client import Client
from lmcache.wire.messages import REFUSED_VERSION, WIRE_VERSION, Attach, Done, Hello, Register, Welcome
from lmcache_cli._version import __version__

logger = logging.getLogger(__name__)

GREETING_S = 1.0
"""How long a server may take to greet; longer means it is stopped or overloaded, and we try again later."""

RETRY_S = 0.5
"""Pause between two attempts: together with a greeting that comes in time, a returning server is found within 2 s."""


@dataclass(frozen=True)
class Address:
    """Where the server's RPC door is: ``host`` as in vLLM's settings ("tcp://localhost"), ``port``."""

    host: str
    port: int

    @property
    def endpoint(self) -> str:
        host = self.host if "://" in self.host else f"tcp://{self.host}"
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.host.removeprefix('tcp://')}:{self.port}"


class Line:
    """One attachment that stands. ``client`` belongs to the one thread that talks."""

    def __init__(self, client: Client, attachment: Attachment, pool: PoolMap | None) -> None:
        self.client = client
        self.attachment = attachment
        self.pool = pool
        self.server: bytes = attachment.reply.server
        self.chunk_tokens: int = attachment.reply.chunk_tokens
        self.ready_bytes: int = attachment.reply.ready_bytes
        self.tenant_secret: bytes = attachment.reply.tenant_secret


class Link:
    """Attaches this process to the server at ``address`` and keeps it attached until ``close``.

    Args:
        name: this process in the server's log, for people.
        want_pool: whether the process copies (worker) or only asks (scheduler).
        registration: what to register, given the server's chunk size in tokens; raises LayoutError where it does not
        fit.
    """

    def __init__(self, address: Address, name: str, want_pool: bool, registration: Callable[[int], Register]) -> None:
        self._address = address
        self._name = name
        self._want_pool = want_pool
        self.registration = registration
        self._line: Line | None = None
        self._lock = threading.Lock()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._closed = False
        self._told: str | None = None
        self._first_try = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lmcache link ({name})", daemon=True)
        self._thread.start()

    @property
    def line(self) -> Line | None:
        """The line that stands now, or None."""
        return self._line

    @property
    def reason(self) -> str | None:
        """The last word to people on how the link stands; None while there is nothing to say."""
        return self._told

    def wait_first_try(self, timeout_s: float) -> None:
        """Wait until the first attempt to attach is over, whatever came of it."""
        self._first_try.wait(timeout_s)

    def drop(self, line: Line, why: str) -> None:
        """Give up a line that does not answer; the link attaches anew. The caller must not use ``line.client``
        again."""
        with self._lock:
            if self._line is not line:
                return
            self._line = None
        self._tell(f"{self._name}: {why}; serving without the cache until the server answers again")
        self._wake()

    def close(self) -> None:
        """Detach and stop trying."""
        self._closed = True
        self._wake()
        self._thread.join(GREETING_S * 2)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"\0")

    def _run(self) -> None:
        # An engine pins its worker to one core and its threads inherit that; ours must not compete with the forward.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        while not self._closed:
            try:
                line = self._attach()
            except LMCacheError as error:
                self._tell(f"{self._name}: not attached to an LMCache server at {self._address}: {error}")
                line = None
            except Exception:
                # A thread that dies unseen would leave the engine without its cache for ever.
                logger.exception("%s: attaching failed unexpectedly", self._name)
                line = None
            if line is None:
                self._first_try.set()
                self._sleep(RETRY_S)
                continue
            self._tell(f"{self._name}: attached to the LMCache server at {self._address}")
            self._line = line
            self._first_try.set()
            self._watch(line)
        self._wake_read.close()
        self._wake_write.close()

    def _watch(self, line: Line) -> None:
        """Return when the line has ended: by the server's death, by ``drop`` or by ``close``."""
        while not self._closed and self._line is line:
            self._sleep(None, line.attachment.socket)
            if not line.attachment.alive():
                with self._lock:
                    if self._line is line:
                        self._line = None
                        self._tell(f"{self._name}: the LMCache server at {self._address} is gone; serving without it")
        with self._lock:
            self._line = None
        line.attachment.close()

    def _sleep(self, timeout_s: float | None, *watched: socket.socket) -> None:
        """Until woken, until a watched socket has something, or for so long; poll, since descriptors may be many."""
        poller = select.poll()
        for waker in (self._wake_read, *watched):
            poller.register(waker, select.POLLIN)
        poller.poll(None if timeout_s is None else timeout_s * 1000)
        self._drain()

    def _drain(self) -> None:
        with contextlib.suppress(OSError):
            while self._wake_read.recv(64):
                pass

    def _tell(self, sentence: str) -> None:
        """Say a thing once: the same failure every half second is one line."""
        if sentence != self._told:
            self._told = sentence
            logger.warning("%s", sentence)

    def _attach(self) -> Line:
        welcome = self._ask()
        registration = self.registration(welcome.chunk_tokens)
        request = Attach(version=WIRE_VERSION, pid=os.getpid(), name=self._name, want_pool=self._want_pool)
        attachment = attach(welcome.attach_path, request, GREETING_S)
        client: Client | None = None
        try:
            pool = None
            if attachment.pool_fd is not None:
                fd, attachment.pool_fd = attachment.pool_fd, None
                pool = PoolMap(fd, attachment.reply.pool_bytes)
            client = Client(attachment.reply.endpoint)
            _expect(client.call(Hello(0, version=WIRE_VERSION, token=attachment.reply.token), GREETING_S), Welcome)
            _expect(client.call(registration, GREETING_S), Done)
            return Line(client, attachment, pool)
        except BaseException:
            attachment.close()
            if client is not None:
                client.close()
            raise

    def _ask(self) -> Welcome:
        """Where to attach: the one thing that a server answers to anybody on its machine."""
        with Client(self._address.endpoint) as client:
            try:
                welcome = client.call(Hello(0, version=WIRE_VERSION), GREETING_S)
            except PeerSilent:
                raise PeerSilent("no server answers there; start one with: lmcache server") from None
            except PeerRefused as error:
                if error.code == REFUSED_VERSION:
                    raise AttachError(
                        f"{error}; install the same lmcache version on both sides (here: {__version__})"
                    ) from None
                raise
        if not isinstance(welcome, Welcome):
            raise WireError(f"a greeting was answered by {type(welcome).__name__}")
        return welcome


def _expect(reply: object, kind: type) -> None:
    if not isinstance(reply, kind):
        raise WireError(f"expected {kind.__name__}, the server answered {type(reply).__name__}")
