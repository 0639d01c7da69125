"""The core's side of the tiers: what it orders of its cascade, and what the cascade asks of it.

The cascade is a client like any other, but for these messages. When it dies, its leases and reservations end as those
of any process, prompts are answered with what L1 holds, and what was not written waits for the next cascade.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from lmcache.cache.base import State
from lmcache.cache.origins import ORIGIN_BYTES
from lmcache.cache.store import Cache
from lmcache.keys import KEY_BYTES, TENANT_BYTES
from lmcache.server.promotions import Promotions
from lmcache.server.refusal import Refusal, count_keys, demand, words
from lmcache.server.sessions import Instance, Sessions
from lmcache.system import Clock
from lmcache.wire import messages as m
from lmcache.wire import orders as o
from lmcache.wire.peer import Peer

WORLD_MAX = 4096
RETRY_MS = 2
WANTED_MAX = 64
WANTED_BYTES_MAX = 512 << 10
SPOILED_MAX = 4096
CANCELLED_MAX = 4096
WRITE_BACK_POLL_S = 0.1


@dataclass(slots=True)
class _Parked:
    """An ``Orders`` that has no answer yet."""

    peer: Peer
    request: o.Orders
    until: float


class Tiering:
    """At most one cascade; without one, every question has the answer of a server without tiers."""

    def __init__(self, cache: Cache, sessions: Sessions, promotions: Promotions, clock: Clock) -> None:
        self.promotions = promotions
        self.is_stopping = False
        self._cache = cache
        self._sessions = sessions
        self._clock = clock
        self.cascade: Instance | None = None  # the process that has enlisted
        self._enlisted: o.Enlist | None = None
        self._parked: _Parked | None = None
        self._spoiled: list[bytes] = []
        self._due: list[tuple[Peer, m.Reply]] = []
        self._looked_at = 0.0

    @property
    def is_drained(self) -> bool:
        """Whether nothing waits to be written, or nobody would write it."""
        writes = self._enlisted is not None and not self._enlisted.read_only
        return not writes or (not self._cache.num_unwritten and not self._cache.holds_leases(self._owner()))

    def answer(self, peer: Peer, instance: Instance, request: m.Request) -> m.Reply | None:
        """The reply to a message of the cascade's; None where it comes later."""
        if isinstance(request, o.Enlist):
            return self._enlist(instance, request)
        if instance is not self.cascade:
            raise Refusal(m.REFUSED_OWNER, "only the server's own cascade may say that")
        match request:
            case o.Orders():
                return self._orders(peer, request)
            case o.Written():
                self._cache.written(instance.id, request.lease, kept=request.kept)
                return m.Done(request.id)
            case o.Admit():
                return self._admit(instance, request)
            case o.Publish():
                return self._publish(instance, request)
            case o.Promoted():
                self.promotions.end(request.promotion)
                return m.Done(request.id)
        raise Refusal(m.REFUSED_INVALID, "not a message of a cascade")

    # --- what clients bring

    def promote(self, instance: Instance, request: m.Lookup, num_held: int) -> int | None:
        """Have looked for what L1 lacks of a prompt; the promotion's number, or None where that is no use."""
        shape = instance.registration
        if self.cascade is None or self.is_stopping or shape is None:
            return None
        return self.promotions.start(instance.id, request.keys[num_held * KEY_BYTES :], shape.world_size)

    def spoil(self, keys: list[bytes]) -> None:
        """The bytes of these chunks failed their check: the tiers must forget them, too."""
        if self.cascade is not None:
            self._spoiled += keys[: SPOILED_MAX - len(self._spoiled)]

    def drop_owner(self, instance: Instance) -> None:
        """A process is gone; perhaps it was the cascade."""
        self.promotions.drop_owner(instance.id)
        if instance is self.cascade:
            self.cascade = self._enlisted = self._parked = None
            self.promotions.end_all()
            self._due.clear()

    # --- time

    def due(self) -> list[tuple[Peer, m.Reply]]:
        """Answers that have come due; call after each turn."""
        parked = self._parked
        if parked is not None:
            work = self._work(parked.request)
            if work is not None or parked.until <= self._clock.now():
                self._parked = None
                self._due.append((parked.peer, work or o.Work(parked.request.id)))
        due, self._due = self._due, []
        return due

    def sweep(self) -> float | None:
        """End what has run out; seconds until ``due`` or this has something to do again, or None."""
        if self._parked is None:
            return self.promotions.sweep()
        waits = [self.promotions.sweep(), max(0.0, self._parked.until - self._clock.now())]
        if self._enlisted is not None and self._enlisted.write_back and self._parked.request.write_bytes:
            waits.append(WRITE_BACK_POLL_S)
        return min((wait for wait in waits if wait is not None), default=None)

    # --- what the cascade says

    def _owner(self) -> int:
        return self.cascade.id if self.cascade is not None else 0

    def _enlist(self, instance: Instance, request: o.Enlist) -> m.Reply:
        if not self._sessions.is_service_token(request.token):
            raise Refusal(m.REFUSED_OWNER, "only the server's own service process may enlist")
        if instance.writer_slot is None:
            raise Refusal(m.REFUSED_INVALID, "a cascade attaches with want_pool")
        if self.cascade is not None and self.cascade is not instance:
            self._cache.drop_owner(self.cascade.id)
            self.drop_owner(self.cascade)
        self.cascade, self._enlisted = instance, request
        return m.Done(request.id)

    def _orders(self, peer: Peer, request: o.Orders) -> m.Reply | None:
        demand(0 <= request.wait_s <= o.ORDERS_S_MAX, f"wait_s is 0 to {o.ORDERS_S_MAX:g}")
        demand(request.write_bytes >= 0, "write_bytes is 0 or more")
        former, self._parked = self._parked, None
        if former is not None:
            self._due.append((former.peer, o.Work(former.request.id)))
        work = self._work(request)
        if work is None:
            self._parked = _Parked(peer, request, self._clock.now() + request.wait_s)
        return work

    def _work(self, request: o.Orders) -> o.Work | None:
        """What there is to do now; None for nothing."""
        promotions = self.promotions
        if not (promotions.news or promotions.cancelled or self._spoiled or self._may_write(request)):
            return None
        wanted: list[o.Wanted] = []
        room = WANTED_BYTES_MAX
        while promotions.news and len(wanted) < WANTED_MAX and len(promotions.news[0].keys) <= room:
            room -= len(promotions.news[0].keys)
            wanted.append(promotions.news.popleft())
        cancelled, promotions.cancelled = promotions.cancelled[:CANCELLED_MAX], promotions.cancelled[CANCELLED_MAX:]
        spoiled, self._spoiled = self._spoiled, []
        writes = self._writes(request)
        if not (wanted or cancelled or spoiled or writes):
            return None
        return o.Work(request.id, tuple(writes), tuple(wanted), tuple(cancelled), b"".join(spoiled))

    def _may_write(self, request: o.Orders) -> bool:
        return request.write_bytes > 0 and self._cache.num_unwritten > 0

    def _writes(self, request: o.Orders) -> list[o.Write]:
        if not self._may_write(request) or self._enlisted is None:
            return []
        from_old_end = self._enlisted.write_back and not self.is_stopping
        if from_old_end:
            now = self._clock.now()
            if now - self._looked_at < WRITE_BACK_POLL_S:
                return []
            self._looked_at = now
        chosen = self._cache.take_writes(self._owner(), request.write_bytes, from_old_end=from_old_end)
        return [
            o.Write(
                writing.lease,
                writing.key,
                writing.origin,
                writing.extent_bytes,
                array("Q", writing.offsets).tobytes(),
                array("Q", writing.checksums).tobytes(),
                self._limit_bytes(writing.origin[:TENANT_BYTES]),
            )
            for writing in chosen
        ]

    def _limit_bytes(self, tenant: bytes) -> int:
        limit = self._cache.quotas.limit_of(tenant)
        return -1 if limit is None else limit

    def _admit(self, instance: Instance, request: o.Admit) -> m.Reply:
        num_keys = count_keys(request.keys)
        demand(1 <= request.world_size <= WORLD_MAX, f"world_size is 1 to {WORLD_MAX}")
        demand(num_keys * request.world_size <= m.KEYS_MAX, f"at most {m.KEYS_MAX} extents")
        states, tickets, offsets = bytearray(), array("Q"), array("Q")
        none = [m.NO_EXTENT] * request.world_size
        for start in range(0, len(request.keys), KEY_BYTES):
            key = request.keys[start : start + KEY_BYTES]
            # An order of the tiers' objects holds: behind a chunk that does not fit none is of use.
            if states and states[-1] == State.FULL:
                states.append(State.FULL)
                tickets.append(0)
                offsets.extend(none)
                continue
            granted = self._cache.admit(
                instance.id, key, world_size=request.world_size, extent_bytes=request.extent_bytes
            )
            states += granted.states
            tickets.append(granted.ticket)
            offsets.extend(granted.offsets or none)
        return o.Admitted(request.id, bytes(states), tickets.tobytes(), offsets.tobytes())

    def _publish(self, instance: Instance, request: o.Publish) -> m.Reply:
        demand(len(request.origin) == ORIGIN_BYTES, f"an origin has {ORIGIN_BYTES} bytes")
        demand(request.extent_bytes > 0, "extent_bytes is above 0")
        checksums = words("checksums", request.checksums, "Q")
        try:
            num_chunks = self._cache.publish(
                instance.id,
                request.ticket,
                checksums,
                origin=request.origin,
                extent_bytes=request.extent_bytes,
                unwritten=request.unwritten,
            )
        except ValueError as error:
            raise Refusal(m.REFUSED_INVALID, str(error)) from None
        if num_chunks is None:
            raise Refusal(m.REFUSED_OWNER, "this ticket is not yours, or has ended")
        return m.Committed(request.id, num_chunks)
