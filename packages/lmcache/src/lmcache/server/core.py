"""The core: one plain loop over the wire, the attach socket, attached processes and the line to the service process."""

from __future__ import annotations

import logging
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from lmcache.cache.store import Cache
from lmcache.errors import LMCacheError, WireError
from lmcache.metrics import Counters
from lmcache.server.addresses import LocalAddresses
from lmcache.server.dispatch import Dispatcher
from lmcache.server.growth import Growth
from lmcache.server.scale import WEIGH_S, Scale
from lmcache.server.sessions import Instance, Sessions
from lmcache.server.supervisor import Supervisor
from lmcache.server.tiering import Tiering
from lmcache.system import Clock
from lmcache.wire import codec
from lmcache.wire import messages as m
from lmcache.wire.door import Door, Visitor
from lmcache.wire.local import LocalListener
from lmcache.wire.peer import Peer, Received
from lmcache.wire.poller import Poller
from lmcache.wire.tcp import TcpListener

MESSAGES_MAX = 64
"""Messages of each way in, and visitors, that one turn of the loop takes."""

CHECKED_ENTRIES_MAX = 10_000
"""Entries whose books are looked through in one go: about 3 us each, so a request waits 30 ms for it at most."""

DRAIN_S = 10.0
"""How long a stop may take for chunks that no tier has yet."""

_IDLE_S = 10.0
_COMPLAINT_S = 10.0
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_REMOTE = (
    "this server serves engines of its own machine only, and you are not on it: run one lmcache server on each host "
    "and point its engines there; other hosts may ask its HTTP API, with a token"
)

log = logging.getLogger("lmcache.core")


@dataclass(frozen=True)
class Ends:
    """Everything the loop waits on. ``wake``: bytes of it are signal numbers, or 0 when the growth thread ended."""

    tcp: TcpListener
    local: LocalListener
    door: Door
    wake: socket.socket
    poller: Poller


class Core:
    """Runs until a signal; whatever one peer does, the loop goes on and the others are served."""

    def __init__(
        self,
        ends: Ends,
        cache: Cache,
        sessions: Sessions,
        dispatcher: Dispatcher,
        tiering: Tiering,
        counters: Counters,
        supervisor: Supervisor,
        growth: Growth,
        clock: Clock,
        attached: Callable[[Instance], m.Attached],
    ) -> None:
        """``attached`` makes the answer to an attach."""
        self._ends = ends
        self._cache = cache
        self._sessions = sessions
        self._dispatcher = dispatcher
        self._tiering = tiering
        self._counters = counters
        self._supervisor = supervisor
        self._growth = growth
        self._clock = clock
        self._attached = attached
        self._local = LocalAddresses()
        self._stop_at: float | None = None  # when a stop waits no longer for the tiers
        self._sweep_at: float | None = None
        self._check_at: float | None = None
        self._weigh_at: float | None = None
        self._scale = Scale()
        self._complained_at = -_COMPLAINT_S
        self.fault: str | None = None
        """Why this core is not healthy, None while it is."""

    def run(self) -> None:
        """Serve until told to stop."""
        poller = self._ends.poller
        poller.watch_socket(self._ends.tcp.socket)
        poller.watch(self._ends.door.fileno())
        poller.watch(self._ends.wake.fileno())
        self._watch_service()
        self._weigh_at = self._clock.now()
        try:
            while not self._is_over():
                self.turn()
        finally:
            self._scale.close()

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        return self._tiering.is_drained or self._clock.now() >= self._stop_at

    def turn(self) -> None:
        """Wait for anything, then do all of it."""
        ends = self._ends
        sockets, fds = ends.poller.wait(0.0 if ends.local.has_waiting else self._patience_s())
        # What a process said is heard before its end is.
        others = [fd for fd in fds if not ends.local.attend(fd)]
        self._serve(ends.local)
        if sockets:
            self._serve(ends.tcp)
        for fd in others:
            self._attend(fd)
        if sockets or fds:
            self._check_at = self._clock.now() + _IDLE_S
        self._keep_time()

    # --- time

    def _patience_s(self) -> float | None:
        """How long nothing needs doing: until the first deadline, or without end."""
        deadlines = (
            self._sweep_at,
            self._check_at,
            self._weigh_at,
            self._stop_at,
            self._supervisor.restart_at,
            self._sessions.next_deadline(),
        )
        first = min([deadline for deadline in deadlines if deadline is not None], default=None)
        return None if first is None else max(0.0, first - self._clock.now())

    def _keep_time(self) -> None:
        now = self._clock.now()
        if self._sessions.has_visitors:
            for visitor in self._sessions.overdue(now):
                self._show_out(visitor)
        if self._supervisor.restart_at is not None and self._supervisor.restart_at <= now:
            self._supervisor.start()
            self._sessions.expect_service(self._supervisor.token)
            self._watch_service()
        held_s, promised_s = self._cache.sweep(), self._tiering.sweep()
        if held_s is None or promised_s is None:
            left_s = promised_s if held_s is None else held_s
        else:
            left_s = min(held_s, promised_s)
        self._sweep_at = None if left_s is None else now + left_s
        for peer, reply in self._tiering.due():
            self._send(peer, reply)
        if self._weigh_at is not None and self._weigh_at <= now:
            self._weigh_at = now + WEIGH_S
            if self._scale.is_heavy(self._cache.num_entries, self._ends.local.held_bytes):
                self._end_strangers()
        if self._check_at is not None and self._check_at <= now:
            self._check_at = None
            self._check()

    def _end_strangers(self) -> None:
        """zmq keeps messages that have no end, and halves of frames, without a limit. Nobody sees from whom; attached
        processes do not come by tcp, so those connections can all end."""
        self._ends.poller.forget_socket(self._ends.tcp.socket)
        self._ends.tcp.reopen()
        self._ends.poller.watch_socket(self._ends.tcp.socket)
        self._counters.reopened_doors += 1
        log.warning("ended all tcp connections: what they had sent of messages without an end filled memory")

    def _check(self) -> None:
        """The books, looked through when there is nothing else to do; not those that would hold the loop for long."""
        if self._cache.num_entries > CHECKED_ENTRIES_MAX:
            return
        try:
            self._cache.check_integrity()
        except LMCacheError as error:
            self.fault = f"the cache's books are wrong: {error}"
            log.error("%s", self.fault)

    # --- messages

    def _serve(self, source: TcpListener | LocalListener) -> None:
        for _ in range(MESSAGES_MAX):
            received = source.receive()
            if received is None:
                return
            reply = self._answer(received)
            if reply is not None:
                self._counters.refused += isinstance(reply, m.Refused)
                self._send(received.peer, reply)

    def _send(self, peer: Peer, reply: m.Reply) -> None:
        if not peer.send(reply):
            self._counters.unsent += 1
            self._sessions.forget(peer)

    def _answer(self, received: Received) -> m.Reply | None:
        """The reply to one message; None for what has no id to answer to."""
        try:
            if received.frame is None:
                raise codec.MalformedFrame(m.REFUSED_INVALID, "not one frame")
            request = codec.decode_request(received.frame)
        except codec.MalformedFrame as error:
            return self._forget_malformed(received, error)
        self._counters.requests += 1
        if received.address is not None and received.address not in self._local:
            return m.Refused(request.id, m.REFUSED_REMOTE, _REMOTE)
        try:
            return self._dispatcher.answer(received.peer, request)
        except Exception as error:
            self._counters.faults += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({os.path.basename(place.filename)}:{place.lineno})"
            log.error("a %s request failed: %s", type(request).__name__.lower(), what)
            return m.Refused(request.id, m.REFUSED_INTERNAL, "the server failed at this request; its log says more")

    def _forget_malformed(self, received: Received, error: codec.MalformedFrame) -> m.Reply | None:
        """Who sends what we do not understand is bound to nothing any more."""
        self._counters.malformed += 1
        self._sessions.forget(received.peer)
        now = self._clock.now()
        if now - self._complained_at >= _COMPLAINT_S:
            self._complained_at = now
            sender = received.address or "a local client"
            log.warning("%d malformed messages so far, the last one from %s", self._counters.malformed, sender)
        return None if error.request_id is None else m.Refused(error.request_id, error.code, str(error))

    # --- descriptors

    def _attend(self, fd: int) -> None:
        instance = self._sessions.attached(fd)
        if instance is not None:
            if instance.visitor.gone():
                for received in self._ends.local.last_words(instance.peer):
                    self._answer(received)
                self._bury(instance)
            return
        visitor = self._sessions.visitor(fd)
        if visitor is not None:
            self._hear(visitor)
        elif fd == self._ends.door.fileno():
            self._open_door()
        elif fd == self._ends.wake.fileno():
            self._wake_up()
        elif fd == self._supervisor.fileno():
            self._ends.poller.forget(fd)
            self._supervisor.bury()
            self._counters.service_restarts += 1

    def _bury(self, instance: Instance) -> None:
        """A process ended: all it held is free before this turn is over."""
        self._ends.poller.forget(instance.visitor.socket.fileno())
        self._cache.drop_owner(instance.id)
        self._tiering.drop_owner(instance)
        self._sessions.drop(instance)
        instance.visitor.close()
        self._counters.detaches += 1
        log.info("%s is gone", instance)

    def _open_door(self) -> None:
        for _ in range(MESSAGES_MAX):
            visitor = self._ends.door.accept(self._clock.now())
            if visitor is None:
                return
            if self._sessions.full():
                self._counters.attach_refusals += 1
                visitor.answer(m.AttachRefused(code=m.REFUSED_BUSY, message="too many processes are attached"))
                visitor.close()
                continue
            self._sessions.welcome(visitor)
            self._ends.poller.watch(visitor.socket.fileno())

    def _hear(self, visitor: Visitor) -> None:
        try:
            request = visitor.read()
        except EOFError:
            self._show_out(visitor)
        except WireError as error:
            self._refuse(visitor, m.REFUSED_INVALID, str(error))
        else:
            if request is not None:
                self._decide(visitor, request)

    def _decide(self, visitor: Visitor, request: m.Attach) -> None:
        if not visitor.may_enter:
            message = (
                f"this server runs as user id {os.geteuid()}, you are {visitor.uid}: run both as one user, or start "
                "the server with --attach-group and be a member of that group"
            )
            self._refuse(visitor, m.REFUSED_OWNER, message)
        elif request.version != m.WIRE_VERSION:
            message = (
                f"this server speaks wire version {m.WIRE_VERSION}, you speak {request.version}: "
                "install the same lmcache version on both sides"
            )
            self._refuse(visitor, m.REFUSED_VERSION, message)
        else:
            self._admit(visitor, request)

    def _admit(self, visitor: Visitor, request: m.Attach) -> None:
        pool_fd, slot = None, None
        try:
            if request.want_pool:
                pool_fd, slot = self._cache.pool.grant_descriptor()
            instance = self._sessions.admit(visitor, request, slot)
            if slot is not None:
                self._cache.attach_writer(instance.id, slot)
            self._counters.attaches += 1
            log.info("%s attached, user id %d", instance, visitor.uid)
            if not visitor.answer(self._attached(instance), pool_fd):
                self._bury(instance)
        except (OSError, LMCacheError) as error:
            self._refuse(visitor, m.REFUSED_BUSY, f"the pool cannot be handed out now: {error}")
        finally:
            if pool_fd is not None:
                os.close(pool_fd)

    def _refuse(self, visitor: Visitor, code: str, message: str) -> None:
        self._counters.attach_refusals += 1
        log.warning("refused an attach of user id %d: %s", visitor.uid, message)
        visitor.answer(m.AttachRefused(code=code, message=message))
        self._show_out(visitor)

    def _show_out(self, visitor: Visitor) -> None:
        self._ends.poller.forget(visitor.socket.fileno())
        self._sessions.show_out(visitor)
        visitor.close()

    def _watch_service(self) -> None:
        fd = self._supervisor.fileno()
        if fd is not None:
            self._ends.poller.watch(fd)

    def _wake_up(self) -> None:
        try:
            numbers = self._ends.wake.recv(64)
        except BlockingIOError:
            return
        if any(number in _STOP_SIGNALS for number in numbers):
            self._stop()
        if 0 in numbers:
            self._report_growth()

    def _stop(self) -> None:
        """End, but write down to the tiers first what only L1 has; a second signal ends that, too."""
        is_first = self._stop_at is None
        self._tiering.is_stopping = True
        self._stop_at = self._clock.now() + (DRAIN_S if is_first else 0.0)
        if is_first and not self._tiering.is_drained:
            num_unwritten = self._cache.num_unwritten
            log.info("writing %d chunks to the tiers before the end, for %g s at most", num_unwritten, DRAIN_S)

    def _report_growth(self) -> None:
        pool = self._cache.pool
        if self._growth.fault is not None:
            self.fault = f"allocating L1 failed at {pool.ready_bytes} of {pool.total_bytes} bytes: {self._growth.fault}"
            log.error("%s", self.fault)
        elif pool.growth_stopped is not None:
            log.warning("L1 stays at %d of %d bytes: %s", pool.ready_bytes, pool.total_bytes, pool.growth_stopped)
        else:
            log.info("all %d bytes of L1 are allocated", pool.ready_bytes)
