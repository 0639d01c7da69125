"""The server in a simulated world: the real core in a process of its own, and the service process it keeps alive."""

# ruff: noqa: ARG005 - signatures are those of what is stood in for
from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lmcache.cache import open_cache
from lmcache.cache.base import Limits
from lmcache.cache.opening import pool_directory
from lmcache.metrics import Counters
from lmcache.server import report
from lmcache.server.core import Core, Ends
from lmcache.server.dispatch import Dispatcher
from lmcache.server.promotions import Promotions
from lmcache.server.sessions import Instance, Sessions
from lmcache.server.tenants import Tenants
from lmcache.server.tiering import Tiering
from lmcache.wire import messages as m
from lmcache.wire.client import LOCAL_SCHEME
from lmcache.wire.door import SPEAK_S, Visitor
from lmcache.wire.framing import pack
from lmcache.wire.local import LocalListener
from lmcache.wire.tcp import TcpListener

from .kernel import Kernel, Process
from .memory import Files, Killed, SeededEntropy
from .network import Network, Socket
from .sockets import Entry, Unix
from .standins import Knocking

ATTACH_PATH = "/run/sim.sock"
TENANT_SECRET = bytes(range(32))
RPC, LOCAL = "tcp://localhost:5555", f"unix://{ATTACH_PATH}.rpc"
ROOT = "/dev/shm/lmcache-1000"
INSTANCE = "5555"
CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Geometry:
    """What stays the same over all lives of a server."""

    pool_bytes: int
    policy: str
    persist: bool
    limits: Limits
    has_tiers: bool


class _Visitor(Visitor):
    socket: Unix  # type: ignore[assignment]

    def answer(self, reply: m.Attached | m.AttachRefused, pool_fd: int | None = None) -> bool:
        files: Files = _Visitor.files
        fds = () if pool_fd is None else (files.send_fd(pool_fd),)
        try:
            return self.socket.send(pack(reply), fds=fds) > 0
        except OSError:
            return False

    files: Files


class _Door:
    def __init__(self, knocking: Knocking) -> None:
        self._knocking = knocking

    def fileno(self) -> int:
        return 1_999_999

    def is_readable(self) -> bool:
        return bool(self._knocking.waiting)

    def accept(self, now: float) -> Visitor | None:
        if not self._knocking.waiting:
            return None
        return _Visitor(self._knocking.waiting.popleft(), 1, 1000, now + SPEAK_S, True)  # type: ignore[arg-type]


class _Poller:
    """Tells what is ready; never waits, since the kernel turns a core only when there is something to do. Sometimes it
    tells one descriptor of several, as epoll may that has more than fit into its answer.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.sockets: list[Socket] = []
        self.fds: dict[int, bool] = {}  # whether it is watched for room to write

    def watch_socket(self, socket: Socket) -> None:
        self.sockets.append(socket)

    def watch(self, fd: int) -> None:
        assert fd not in self.fds, "what is watched already is an error of epoll"
        self.fds[fd] = False

    def turn_to(self, fd: int, *, writable: bool) -> None:
        assert fd in self.fds, "what is not watched is an error of epoll"
        self.fds[fd] = writable

    def forget(self, fd: int) -> None:
        self.fds.pop(fd, None)

    def ready(self, find: Callable[[int], Any]) -> tuple[list[Socket], list[int]]:
        return (
            [socket for socket in self.sockets if socket.inbox],
            [fd for fd, writable in self.fds.items() if (end := find(fd)) is not None and _is_ready(end, writable)],
        )

    def wait(self, timeout_s: float | None) -> tuple[list[Socket], list[int]]:
        del timeout_s
        sockets, fds = self.ready(self.find)
        if len(fds) > 1 and self._kernel.chance(0.1):
            fds = [self._kernel.random.choice(fds)]
        return sockets, fds

    find: Callable[[int], Any]


def _is_ready(end: Any, writable: bool) -> bool:
    return bool(end.is_writable() if writable else end.is_readable())


class _Wake:
    """Signals to the core."""

    def __init__(self) -> None:
        self.data = bytearray()

    def fileno(self) -> int:
        return 1_999_998

    def is_readable(self) -> bool:
        return bool(self.data)

    def recv(self, num_bytes: int) -> bytes:
        data, self.data = bytes(self.data[:num_bytes]), self.data[num_bytes:]
        return data


class _Supervisor:
    """Starts the service process again a while after its end."""

    def __init__(self, core: CoreProcess) -> None:
        self._core = core
        self.token = b""
        self.restart_at: float | None = None
        self.line: Unix | None = None
        self.is_over = False  # nothing is started any more

    def start(self) -> None:
        core = self._core
        self.restart_at = None
        if self.is_over:
            return
        self.token = core.entropy.token(16)
        service = Process(core.kernel, f"service{next(core.kernel.serials)}")
        self.line, theirs = Unix.pair(core.kernel, core, service)
        core.service = service
        core.start_service(service, self.token, theirs)

    def fileno(self) -> int | None:
        return None if self.line is None else self.line.fileno()

    def bury(self) -> None:
        if self.line is not None:
            self.line.close()
        self.line = None
        self.restart_at = self._core.now() + 0.1


class _Growth:
    fault: str | None = None


class CoreProcess(Process):
    """One life of the core."""

    def __init__(
        self,
        kernel: Kernel,
        network: Network,
        files: Files,
        geometry: Geometry,
        knocking: Knocking,
        start_service: Callable[[Process, bytes, Unix], None],
        life: int,
    ) -> None:
        super().__init__(kernel, f"core{life}")
        self.files = files
        self.geometry = geometry
        self.start_service = start_service
        self.service: Process | None = None
        self.entropy = SeededEntropy(life * 1_000_003 + kernel.random.randrange(1 << 30))
        self.counters = Counters()
        self.has_stopped = False
        self.num_turns = 0
        self._wake_at: float | None = None
        self._poller = _Poller(kernel)
        self.wake = _Wake()
        self._knocking = knocking
        _Visitor.files = files
        self.at_exit.append(self._hang_up)
        self.enter()
        try:
            self._start(network)
        finally:
            self.leave()

    def _start(self, network: Network) -> None:
        tcp = TcpListener(RPC)
        self._entry = Entry(network, LOCAL.removeprefix(LOCAL_SCHEME))
        local = LocalListener(self._entry, self._poller)  # type: ignore[arg-type]
        geometry = self.geometry
        self.cache = open_cache(
            pool_directory(ROOT, INSTANCE),
            geometry.pool_bytes,
            CHUNK_TOKENS,
            policy=geometry.policy,
            persist=geometry.persist,
            files=self.files,
            clock=self,
            entropy=self.entropy,
            limits=geometry.limits,
            has_tiers=geometry.has_tiers,
        )
        self.sessions = Sessions(self.entropy)
        self.supervisor = _Supervisor(self)
        self.tenants = Tenants(TENANT_SECRET)
        self.tiering = Tiering(self.cache, self.sessions, Promotions(self, self.entropy), self)
        self.server_id = self.entropy.token(16)
        welcome = m.Welcome(0, self.server_id, m.WIRE_VERSION, "sim", CHUNK_TOKENS, ATTACH_PATH)
        dispatcher = Dispatcher(
            self.cache,
            self.sessions,
            self.tiering,
            self.tenants,
            self.counters,
            welcome,
            self._snapshot,
            lambda sentence: None,
        )
        ends = Ends(tcp, local, _Door(self._knocking), self.wake, self._poller)  # type: ignore[arg-type]
        self._poller.find = self._find
        self.core = Core(
            ends,
            self.cache,
            self.sessions,
            dispatcher,
            self.tiering,
            self.counters,
            self.supervisor,  # type: ignore[arg-type]
            _Growth(),  # type: ignore[arg-type]
            self,
            self._attached,
        )
        self._poller.watch_socket(tcp.socket)  # type: ignore[arg-type]
        for fd in (1_999_999, 1_999_998):
            self._poller.watch(fd)
        if self.geometry.has_tiers:
            self.supervisor.start()
            self.sessions.expect_service(self.supervisor.token)
            fd = self.supervisor.fileno()
            assert fd is not None
            self._poller.watch(fd)

    def _find(self, fd: int) -> Any:
        ends = self.core._ends
        if fd == 1_999_999:
            return ends.door
        if fd == 1_999_998:
            return self.wake
        if fd == self._entry.fileno():
            return self._entry
        peer = ends.local._peers.get(fd)
        if peer is not None:
            return peer.stream._socket
        instance = self.sessions.attached(fd)
        if instance is not None:
            return instance.visitor.socket
        visitor = self.sessions.visitor(fd)
        if visitor is not None:
            return visitor.socket
        line = self.supervisor.line
        return line if line is not None and line.fileno() == fd else None

    def _snapshot(self) -> bytes:
        frame = report.Frame("sim", CHUNK_TOKENS, self.geometry.policy, 1.0)
        return report.document(self.cache.usage(), self.counters, self.sessions.instances(), frame, self.core.fault)

    def _attached(self, instance: Instance) -> m.Attached:
        pool = self.cache.pool
        return m.Attached(
            server=self.server_id,
            instance=instance.id,
            token=instance.token,
            endpoint=LOCAL,
            pool_bytes=pool.total_bytes,
            ready_bytes=pool.ready_bytes,
            chunk_tokens=CHUNK_TOKENS,
            tenant_secret=TENANT_SECRET,
        )

    # --- as the kernel sees it

    def _has_work(self) -> bool:
        if self._wake_at is not None and self.now() >= self._wake_at:
            return True
        if self.core._ends.local.has_waiting:
            return True
        if self.has_news:
            sockets, fds = self._poller.ready(self._find)
            self.has_news = bool(sockets or fds)
        return self.has_news

    def _next_timer(self) -> float | None:
        return None if self._wake_at is None else self._wake_at - self.skew_s

    def turn(self) -> None:
        """One turn of the core's loop, or its death in the middle of a write."""
        self.num_turns += 1
        self.enter()
        try:
            self.core.turn()
            if self.core._is_over():
                self.cache.close(persist=self.geometry.persist)
                self.has_stopped = True
        except Killed:
            self.kernel.trace("core died in a write")
            self.leave()
            self.kill()
            return
        finally:
            self.leave()
        if self.has_stopped:
            self.kill()
            return
        patience_s = self.core._patience_s()
        self._wake_at = None if patience_s is None else self.now() + patience_s

    def signal(self) -> None:
        """SIGTERM."""
        self.wake.data += bytes([signal.SIGTERM])
        self.has_news = True

    def grow(self, num_bytes: int) -> None:
        """A step of the thread that allocates the pool."""
        self.enter()
        try:
            self.cache.pool.grow(num_bytes, wait=False)
        except Killed:
            self.leave()
            self.kill()
        finally:
            self.leave()

    def _hang_up(self) -> None:
        self.files.die()
        while self._knocking.waiting:
            self._knocking.waiting.popleft().close()
