"""One request in, one reply out: the only place where messages become calls of the cache."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Callable

import msgspec

from lmcache.cache.extents import Extents
from lmcache.cache.origins import LAYOUT_BYTES
from lmcache.cache.store import Cache
from lmcache.config import GB
from lmcache.errors import LayoutError
from lmcache.keys import KEY_BYTES, NAMESPACE_PREFIX_BYTES, TENANT_BYTES
from lmcache.metrics import Counters
from lmcache.server.refusal import Refusal, count_keys, demand, words
from lmcache.server.sessions import Instance, Sessions
from lmcache.server.tenants import SALT_BYTES_MAX, Known, Tenants, TooMany
from lmcache.server.tiering import RETRY_MS, Tiering
from lmcache.wire import messages as m
from lmcache.wire.peer import Peer

RANKS_MAX = 4096
_GROUPS_MAX, _DEVICES_MAX, _TEXT_MAX = 64, 64, 512


class Dispatcher:
    """Answers requests of peers whose place is known to be this machine."""

    def __init__(
        self,
        cache: Cache,
        sessions: Sessions,
        tiering: Tiering,
        tenants: Tenants,
        counters: Counters,
        welcome: m.Welcome,
        report: Callable[[], bytes],
        note: Callable[[str], None],
    ) -> None:
        """``welcome`` is the answer to Hello but for its id; ``report`` makes the snapshot, ``note`` logs one event."""
        self._cache = cache
        self._sessions = sessions
        self._tiering = tiering
        self._tenants = tenants
        self._counters = counters
        self._welcome = welcome
        self._report = report
        self._note = note

    def answer(self, peer: Peer, request: m.Request) -> m.Reply | None:
        """The reply to one request, None where it comes later; a refusal is a reply, and so is a fault of ours (the
        caller counts those).

        Raises:
            Exception: a fault in here or in the cache.
        """
        try:
            return self._answer(peer, request)
        except Refusal as refusal:
            return m.Refused(request.id, refusal.code, str(refusal), refusal.retry_ms)
        except LayoutError as error:
            return m.Refused(request.id, m.REFUSED_LAYOUT, str(error))

    def _answer(self, peer: Peer, request: m.Request) -> m.Reply | None:
        match request:
            case m.Lookup():
                return self._lookup(self._speaker(peer), request)
            case m.Release():
                return self._release(self._speaker(peer), request)
            case m.Reserve():
                return self._reserve(self._speaker(peer), request)
            case m.Commit():
                return self._commit(self._speaker(peer), request)
            case m.Abort():
                return self._abort(self._speaker(peer), request)
            case m.Ping():
                return m.Pong(request.id, self._cache.pool.ready_bytes)
            case m.Hello():
                return self._hello(peer, request)
            case m.Register():
                return self._register(self._speaker(peer), request)
            case m.Bye():
                return self._bye(self._speaker(peer), request)
            case m.Snapshot():
                self._demand_service(peer)
                return m.Report(request.id, self._report())
            case m.Clear():
                self._demand_service(peer)
                cleared = self._cache.clear()
                self._note(f"cleared {cleared.num_entries} entries, {cleared.num_kept} are in use and stay")
                return m.Cleared(request.id, cleared.num_entries, cleared.num_kept)
            case m.Peek():
                self._demand_service(peer)
                count_keys(request.keys)
                return m.Held(request.id, self._cache.peek(request.keys))
            case m.Tenants():
                self._demand_service(peer)
                return m.Report(request.id, self._tenants.document(self._cache.quotas.used_bytes, request.salt))
            case m.Limit():
                self._demand_service(peer)
                return self._limit(request)
            case _:
                return self._tiering.answer(peer, self._speaker(peer), request)

    # --- who speaks

    def _speaker(self, peer: Peer) -> Instance:
        instance = self._sessions.speaker(peer)
        if instance is None:
            raise Refusal(m.REFUSED_UNKNOWN, "this connection speaks for no attached process: attach, then say Hello")
        return instance

    def _demand_service(self, peer: Peer) -> None:
        if not self._sessions.is_service(peer):
            raise Refusal(m.REFUSED_OWNER, "only the server's own service process may ask that; use the HTTP API")

    def _hello(self, peer: Peer, request: m.Hello) -> m.Reply:
        if request.version != m.WIRE_VERSION:
            raise Refusal(
                m.REFUSED_VERSION,
                f"this server speaks wire version {m.WIRE_VERSION}, you speak {request.version}: "
                "install the same lmcache version on both sides",
            )
        if request.token and not self._sessions.bind(peer, request.token):
            raise Refusal(m.REFUSED_UNKNOWN, "this token is not, or no longer, of an attached process: attach again")
        welcome = self._welcome
        return m.Welcome(
            request.id, welcome.server, welcome.version, welcome.software, welcome.chunk_tokens, welcome.attach_path
        )

    def _register(self, instance: Instance, request: m.Register) -> m.Reply:
        texts = (request.model, request.engine)
        is_worker = request.role == "worker"
        demand(is_worker or request.role == "scheduler", "role is 'scheduler' or 'worker'")
        demand(max(map(len, texts)) <= _TEXT_MAX, f"model and engine have at most {_TEXT_MAX} letters")
        demand(1 <= request.world_size <= RANKS_MAX, f"world_size is 1 to {RANKS_MAX}")
        demand(0 <= request.rank < request.world_size, "rank is 0 to world_size - 1")
        demand(len(request.groups) <= _GROUPS_MAX, f"at most {_GROUPS_MAX} layer groups")
        demand(len(request.device_ids) <= _DEVICES_MAX, f"at most {_DEVICES_MAX} devices")
        if is_worker:
            demand(instance.writer_slot is not None, "a worker attaches with want_pool")
            Extents(self._cache.pool.total_bytes).size_class(request.extent_bytes)
        demand(len(request.namespace) in (0, KEY_BYTES), f"namespace has {KEY_BYTES} bytes, or none")
        former = instance.registration
        if former is not None:
            if former.namespace != request.namespace:
                self._forget(instance, former.namespace)
            if msgspec.structs.replace(former, id=request.id, namespace=request.namespace) != request:
                self._cache.drop_owner(instance.id)
        instance.registration = request
        instance.layout = _layout(request)
        if request.namespace:
            self._tenants.meet(Known(*texts, request.world_size, request.namespace.hex()))
        self._note(
            f"{instance} registered as {request.role} {request.rank} of {request.world_size}, "
            f"{_one_line(request.engine)}, model {_one_line(request.model)}, {request.extent_bytes} bytes a chunk"
        )
        return m.Done(request.id)

    def _forget(self, instance: Instance, namespace: bytes) -> None:
        """An engine says that it is another one now: nobody asks for what the former one stored, if no other does."""
        others = (other.registration for other in self._sessions.instances() if other is not instance)
        if not any(other is not None and other.namespace == namespace for other in others):
            self._tenants.forget(namespace.hex())

    def _bye(self, instance: Instance, request: m.Bye) -> m.Reply:
        self._cache.drop_owner(instance.id)
        self._sessions.unbind(instance)
        self._note(f"{instance} said goodbye")
        return m.Done(request.id)

    def _limit(self, request: m.Limit) -> m.Reply:
        demand(len(request.salt.encode()) <= SALT_BYTES_MAX, f"a salt with a limit has at most {SALT_BYTES_MAX} bytes")
        is_number = request.limit_gb is None or (math.isfinite(request.limit_gb * GB) and request.limit_gb >= 0)
        demand(is_number, "a limit is a number of GB, 0 or more")
        try:
            existed = self._tenants.limit(request.salt, request.limit_gb)
        except TooMany as error:
            raise Refusal(m.REFUSED_BUSY, str(error)) from None
        limit_bytes = None if request.limit_gb is None else int(request.limit_gb * GB)
        self._cache.quotas.set_limit(self._tenants.id_of(request.salt), limit_bytes)
        return m.Limited(request.id, existed)

    # --- verbs of the cache

    def _lookup(self, instance: Instance, request: m.Lookup) -> m.Reply:
        num_keys = count_keys(request.keys)
        demand(0 <= request.first_chunk <= num_keys, "first_chunk is 0 to the number of keys")
        if request.promotion and self._tiering.promotions.is_running(instance.id, request.promotion):
            instance.remember(request.id, request.promotion)
            return m.Promoting(request.id, request.promotion, self._cache.prefix_chunks(request.keys), RETRY_MS)
        found = self._cache.lookup(instance.id, request.keys, lease=request.lease, first_chunk=request.first_chunk)
        if found.num_chunks < num_keys and request.promote and not request.promotion:
            # A prefix that was cut by the cap on leased bytes is in L1 to its end: no tier need be asked.
            num_held = self._cache.prefix_chunks(request.keys)
            promotion = self._tiering.promote(instance, request, num_held) if num_held < num_keys else None
            if promotion is not None:
                if found.lease:
                    self._cache.release(instance.id, found.lease)
                instance.remember(request.id, promotion)
                return m.Promoting(request.id, promotion, num_held, RETRY_MS)
        if found.lease:
            instance.remember(request.id, found.lease)
        counters = self._counters
        if request.counted:
            counters.lookups += 1
            counters.lookup_requested_tokens += num_keys * self._welcome.chunk_tokens
            counters.lookup_hit_tokens += found.num_chunks * self._welcome.chunk_tokens
        counters.leases += found.lease != 0
        return m.Found(
            request.id,
            found.num_chunks,
            found.lease,
            found.lease_s,
            array("Q", found.offsets).tobytes(),
            array("Q", found.checksums).tobytes(),
        )

    def _release(self, instance: Instance, request: m.Release) -> m.Reply:
        if request.question:
            granted = instance.granted.pop(request.question, 0)
            if not self._tiering.promotions.give_up(instance.id, granted):
                self._cache.release(instance.id, granted)
            return m.Done(request.id)
        failed = words("failed", request.failed, "I")
        if self._tiering.promotions.give_up(instance.id, request.lease):
            return m.Done(request.id)
        spoiled = self._cache.release(instance.id, request.lease, failed)
        if spoiled is None:
            raise Refusal(m.REFUSED_OWNER, "this lease is not yours, or has ended")
        self._tiering.spoil(spoiled)
        self._counters.retrieves += 1
        return m.Done(request.id)

    def _reserve(self, instance: Instance, request: m.Reserve) -> m.Reply:
        count_keys(request.keys)
        shape = instance.registration
        if shape is None or shape.role != "worker":
            raise Refusal(m.REFUSED_INVALID, "only a registered worker may reserve")
        demand(len(request.tenant) == TENANT_BYTES, f"a tenant has {TENANT_BYTES} bytes")
        demand(
            len(request.namespace) == NAMESPACE_PREFIX_BYTES, f"a namespace begins with {NAMESPACE_PREFIX_BYTES} bytes"
        )
        granted = self._cache.reserve(
            instance.id,
            request.keys,
            rank=shape.rank,
            world_size=shape.world_size,
            extent_bytes=shape.extent_bytes,
            origin=request.tenant + request.namespace + instance.layout,
        )
        self._counters.reserved_chunks += granted.states.count(m.GRANTED)
        offsets = array("Q", granted.offsets).tobytes()
        return m.Granted(request.id, granted.ticket, granted.states, offsets, self._cache.pool.ready_bytes)

    def _commit(self, instance: Instance, request: m.Commit) -> m.Reply:
        checksums = words("checksums", request.checksums, "Q")
        try:
            num_chunks = self._cache.commit(instance.id, request.ticket, checksums)
        except ValueError as error:
            raise Refusal(m.REFUSED_INVALID, str(error)) from None
        if num_chunks is None:
            raise Refusal(m.REFUSED_OWNER, "this ticket is not yours, or has ended")
        self._counters.stores += 1
        self._counters.stored_chunks += num_chunks
        return m.Committed(request.id, num_chunks)

    def _abort(self, instance: Instance, request: m.Abort) -> m.Reply:
        if not self._cache.abort(instance.id, request.ticket):
            raise Refusal(m.REFUSED_OWNER, "this ticket is not yours, or has ended")
        self._counters.aborts += 1
        return m.Done(request.id)


def _layout(shape: m.Register) -> bytes:
    """Fingerprint of what an engine says of its layout; the number of its blocks is not part of it."""
    groups = [msgspec.structs.replace(group, num_blocks=0, concrete_shape="") for group in shape.groups]
    text = msgspec.json.encode((shape.world_size, shape.extent_bytes, groups))
    return hashlib.sha256(text).digest()[:LAYOUT_BYTES]


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)
