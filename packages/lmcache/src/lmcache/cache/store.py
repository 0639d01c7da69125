"""The L1 cache: what is held, by whom, and where. Knows nothing of messages; never touches a chunk's bytes.

Every verb leaves the records file telling the truth before it returns. No verb blocks, but for at most
``inline_grow_bytes`` of memory allocation in ``reserve``. Call ``sweep`` after each batch of verbs and wait no longer
than it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from lmcache.cache.adopt import adopt
from lmcache.cache.base import NO_WRITER, Cleared, Found, Limits, Owner, Reservation, Usage, Writing
from lmcache.cache.claims import Claim, Claims, Pending
from lmcache.cache.evict.base import Policy
from lmcache.cache.extents import Extents
from lmcache.cache.granting import Grant, Granting
from lmcache.cache.index import Index
from lmcache.cache.integrity import check
from lmcache.cache.leases import Lease, Leases
from lmcache.cache.origins import UNKNOWN, Origins
from lmcache.cache.pool import Pool
from lmcache.cache.quarantine import Quarantine
from lmcache.cache.quotas import Quotas
from lmcache.cache.records import Records, slots_max
from lmcache.cache.room import Room
from lmcache.cache.writedown import WriteDown
from lmcache.keys import KEY_BYTES
from lmcache.system import Clock, Entropy

RANKS_MAX = 0xFFFF


class Cache:
    """Facade over index, extents, records, leases and reservations. One thread only, but ``pool`` may grow in
    another."""

    def __init__(
        self,
        pool: Pool,
        records: Records,
        policy: Policy,
        clock: Clock,
        limits: Limits,
        *,
        entropy: Entropy,
        has_tiers: bool = False,
    ) -> None:
        """``has_tiers``: what becomes visible waits to be written to the tiers, see ``take_writes``."""
        self.pool = pool
        self._records = records
        self._clock = clock
        self._limits = limits
        self._entropy = entropy
        self._index = Index(slots_max(pool.total_bytes))
        self._extents = Extents(pool.total_bytes)
        self._extents.set_ready(pool.ready_bytes)
        origins = Origins()
        index = self._index
        self.quotas = Quotas(policy, lambda entry: origins.tenant(index.origin[index.first_slot(entry)]))
        self.policy: Policy = self.quotas
        self._room = Room(pool, self._extents, index, self.quotas, records, origins)
        self._quarantine = Quarantine(clock)
        self._leases = Leases(self._room, self._index, self.policy, records, limits, self._quarantine)
        self._claims = Claims(self._room, self._index, records)
        self._wake = 0.0  # nothing can run out before
        self._poll_at = 0.0
        self._writing = WriteDown(self._room, index, self._extents, pool)
        self._granting = Granting(self._room, self._extents, self._index, self._claims, self.policy, limits)
        self._counts = dict.fromkeys(("shortened", "leases", "reservations", "adopted"), 0)
        adopted = adopt(pool, records, index, self._extents, origins, self.quotas, self._claims)
        self._counts["adopted"] = adopted.num_entries
        self._room.unwritten.counts = has_tiers
        self._room.unwritten.add(adopted.dirty)

    def attach_writer(self, owner: Owner, slot: int) -> None:
        """This owner was handed the descriptor of that writer slot (``pool.grant_descriptor``)."""
        self._claims.writers[owner] = slot

    def lookup(self, owner: Owner, keys: bytes, *, lease: bool = True, first_chunk: int = 0) -> Found:
        """The longest held prefix of ``keys`` (32 bytes each), touched, and leased from ``first_chunk`` on.

        A prefix whose lease would exceed the cap on leased bytes is answered shorter.
        """
        entries = self._index.prefix(keys)
        self.policy.touch(entries[::-1])
        wanted = entries[first_chunk:]
        number, lease_s = 0, 0.0
        if lease and wanted:
            num_pinned = self._leases.pin(wanted, self._lease_limit_bytes())
            if num_pinned < len(wanted):
                self._counts["shortened"] += 1
                wanted = wanted[:num_pinned]
                entries = entries[: first_chunk + num_pinned]
            if wanted:
                number, lease_s = self._number(), self._limits.lease_s
                self._leases.add(number, owner, self._clock.now() + lease_s, wanted)
        offsets, checksums = self._index.details(wanted)
        return Found(len(entries), number, lease_s, offsets, checksums)

    def prefix_chunks(self, keys: bytes) -> int:
        """Length of the longest held prefix; nothing is touched."""
        return len(self._index.prefix(keys))

    def holds_leases(self, owner: Owner) -> bool:
        """Whether an owner has leases."""
        return bool(self._leases.of_owner.get(owner))

    @property
    def num_entries(self) -> int:
        """Visible entries."""
        return len(self._index.by_key)

    @property
    def num_unwritten(self) -> int:
        """Entries that wait to be written to the tiers."""
        return len(self._room.unwritten)

    def peek(self, keys: bytes) -> bytes:
        """A byte for each of ``keys`` (32 bytes each), 1 where the chunk is held; nothing is touched."""
        by_key = self._index.by_key
        return bytes(keys[start : start + KEY_BYTES] in by_key for start in range(0, len(keys), KEY_BYTES))

    def release(self, owner: Owner, lease: int, failed: Sequence[int] = ()) -> list[bytes] | None:
        """End a lease; None when it is not this owner's or is gone, else the keys that left the index by it.

        ``failed``: chunks whose bytes failed the check, counted from the lease's first chunk. They leave the index
        now, and their extents are free when no lease holds them.
        """
        held = self._leases.by_id.get(lease)
        if held is None or held.owner != owner:
            return None
        spoiled = self._leases.quarantine(lease, failed)
        self._leases.end(lease)
        self._records.flush()
        return spoiled

    def reserve(
        self, owner: Owner, keys: bytes, *, rank: int, world_size: int, extent_bytes: int, origin: bytes = UNKNOWN
    ) -> Reservation:
        """An extent for each chunk that is neither held nor written by somebody else, earlier chunks first.

        Once one is FULL, all later ones are: a prefix with a hole is useless.

        Raises:
            LayoutError: this pool can never hold an extent of that size.
            ValueError: the rank is not below the world size.
        """
        if not 0 <= rank < world_size <= RANKS_MAX:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        grant = self._granting.reserve(owner, keys, rank, (world_size, extent_bytes), origin, self._clock.now())
        return self._issue(grant)

    def admit(self, owner: Owner, key: bytes, *, world_size: int, extent_bytes: int) -> Reservation:
        """Extents of all ranks for one chunk that comes from a tier: one state, an offset a rank if granted.

        Raises:
            LayoutError, ValueError: as ``reserve``.
        """
        if not 0 < world_size <= RANKS_MAX:
            raise ValueError(f"{world_size} ranks")
        return self._issue(self._granting.admit(owner, key, (world_size, extent_bytes), self._clock.now()))

    def publish(
        self,
        owner: Owner,
        ticket: int,
        checksums: Sequence[int],
        *,
        origin: bytes,
        extent_bytes: int,
        unwritten: bool = False,
    ) -> int | None:
        """Make an admitted chunk visible, now that its header has told its origin and its extents' true length.

        ``unwritten``: not all tiers have it. Returns 1, or 0 where the tenant's limit leaves no room for it (the
        extents are free then); None and ValueError as ``commit``.
        """
        held = self._claims.by_ticket.get(ticket)
        if held is None or held.owner != owner:
            return self.commit(owner, ticket, checksums)
        pending = held.parts[0][0]
        world_size, granted_bytes = pending.shape
        size_class = self._extents.size_class
        if not held.promoted or size_class(extent_bytes) != size_class(granted_bytes):
            raise ValueError("not a chunk of that length from a tier")
        if not self._room.relabel([slot for _, _, slot in held.parts], origin):
            self.abort(owner, ticket)
            return 0
        pending.shape = (world_size, extent_bytes)
        pending.promoted = not unwritten
        num_extents = self.commit(owner, ticket, checksums)
        return None if num_extents is None else min(num_extents, 1)

    def take_writes(self, owner: Owner, bytes_max: int, *, from_old_end: bool) -> list[Writing]:
        """Chunks that no tier has yet, each leased to ``owner``, as many as fit into ``bytes_max`` and one more.

        Args:
            from_old_end: take those that will be evicted next, and only while L1 is nearly full.
        """

        def lease(entry: int) -> int | None:
            if not self._leases.pin([entry], self._lease_limit_bytes()):
                return None
            number = self._number()
            self._leases.add(number, owner, self._clock.now() + self._limits.lease_s, [entry], writes=True)
            return number

        return self._writing.choose(bytes_max, self._lease_limit_bytes(), lease, from_old_end=from_old_end)

    def written(self, owner: Owner, lease: int, *, kept: bool) -> bool:
        """The end of a ``Writing``; one that is not ``kept`` by the tiers waits for another turn."""
        held = self._leases.by_id.get(lease)
        if held is None or held.owner != owner:
            return False
        entry = held.entries[0]
        if kept:
            held.writes = False
            if entry not in self._leases.quarantined:
                self._records.mark_clean(self._index.slots(entry))
        self._leases.end(lease)
        self._records.flush()
        return True

    def commit(self, owner: Owner, ticket: int, checksums: Sequence[int]) -> int | None:
        """Publish the granted extents, one checksum each in order; returns how many are visible or will be.

        None: the reservation is not this owner's or is gone (its late writer is thereby done with its extents).

        Raises:
            ValueError: not as many checksums as extents; the reservation stands.
        """
        held = self._claims.by_ticket.get(ticket)
        if held is None or held.owner != owner:
            self._late(owner, ticket)
            return None
        if len(checksums) != len(held.parts):
            raise ValueError(f"{len(checksums)} checksums for {len(held.parts)} extents")
        claim = self._claims.take(ticket)
        num_published = sum(not pending.doomed for pending, _, _ in claim.parts)
        complete = self._claims.commit(claim, list(checksums))
        self._records.flush()
        self.policy.insert(self._claims.reveal(complete))
        return num_published

    def abort(self, owner: Owner, ticket: int) -> bool:
        """Give a reservation's extents back unpublished; False when it is not this owner's or is gone."""
        held = self._claims.by_ticket.get(ticket)
        if held is None or held.owner != owner:
            self._late(owner, ticket)
            return False
        self._claims.discard(self._claims.take(ticket))
        self._records.flush()
        return True

    def drop_owner(self, owner: Owner) -> None:
        """This owner is gone: its leases end, its reservations are discarded, what was set aside for it is free.

        A process may have let go of us and still be in the middle of a copy (it gave a silent server up): while it has
        the pool mapped, what it may be writing to stays aside.
        """
        for lease in list(self._leases.of_owner.get(owner, ())):
            self._leases.end(lease)
        writer = self._claims.writers.get(owner, NO_WRITER)
        can_write = writer != NO_WRITER and self.pool.writer_alive(writer)
        for ticket in list(self._claims.of_owner.get(owner, ())):
            if can_write:
                self._claims.expire(ticket)
            else:
                self._claims.discard(self._claims.take(ticket))
        if not can_write:
            for ticket in [ticket for ticket, aside in self._claims.aside.items() if aside.owner == owner]:
                self._claims.settle(ticket)
        self._claims.writers.pop(owner, None)
        self._records.flush()

    def clear(self) -> Cleared:
        """Forget every entry that no lease or reservation holds."""
        victims = [entry for entry in self._index.by_key.values() if entry not in self._room.leased]
        num_evicted = self._room.num_evicted
        for entry in victims:
            self._room.evict(entry)
        self._room.num_evicted = num_evicted
        self._records.flush()
        return Cleared(len(victims), len(self._index.by_key) + len(self._claims.pending))

    def sweep(self) -> float | None:
        """End what has run out; seconds until the next time something may, or None when nothing can."""
        leases, claims, pendings = self._expiring()
        if not (leases or claims or pendings or self._claims.aside):
            self._wake = 0.0
            return None
        now = self._clock.now()
        if now >= self._wake:
            self._expire(now)
        first = [lease.expires for lease in islice(leases.values(), 1)]
        first += [claim.expires for claim in islice(claims.values(), 1)]
        first += [pending.expires for pending in islice(pendings.values(), 1)]
        if self._claims.aside:
            first.append(self._poll_at)
        self._wake = min(first, default=0.0)
        return max(0.0, self._wake - now) if first else None

    def check_integrity(self) -> None:
        """Compare index, extents, records, leases and reservations; about 3 us an entry.

        Raises:
            IntegrityError: they contradict each other, or free + held is not the total.
        """
        self._extents.set_ready(self.pool.ready_bytes)
        check(self._index, self._extents, self._records, self._leases, self._claims, self.quotas, self._room)

    def usage(self) -> Usage:
        """State and counters."""
        leases, claims, index, counts = self._leases, self._claims, self._index, self._counts
        aside = [slot for held in claims.aside.values() for slot in held.slots]
        return Usage(
            total_bytes=self.pool.total_bytes,
            ready_bytes=self.pool.ready_bytes,
            used_bytes=self._extents.used_bytes,
            leased_bytes=leases.bytes,
            set_aside_bytes=sum(self._extents.piece_at(index.offset[slot]).size for slot in aside),
            num_entries=len(index.by_key),
            num_leased_entries=len(self._room.leased),
            num_reserved_entries=len(claims.pending),
            num_leases=len(leases.by_id),
            num_reservations=len(claims.by_ticket),
            num_slots=index.slots_max,
            num_quarantined=self._quarantine.count,
            num_evicted=self._room.num_evicted,
            num_refused_full=self._granting.num_refused,
            num_unwritten=len(self._room.unwritten),
            num_lost=self._room.unwritten.num_lost,
            num_shortened=counts["shortened"],
            num_expired_leases=counts["leases"],
            num_expired_reservations=counts["reservations"],
            num_adopted=counts["adopted"],
            growth_stopped=self.pool.growth_stopped,
            quarantined=self._quarantine.latest(),
        )

    def close(self, *, persist: bool) -> None:
        """End of this cache's life: nothing may be called after it. Without ``persist`` its files are removed."""
        self._records.flush()
        if persist:
            slots = [slot for entry in self.policy.victims() for slot in self._index.slots(entry)]
            self._records.write_order(slots)
        self.pool.close(persist=persist)

    def _expiring(self) -> tuple[dict[int, Lease], dict[int, Claim], dict[bytes, Pending]]:
        return self._leases.by_id, self._claims.by_ticket, self._claims.pending

    def _expire(self, now: float) -> None:
        leases, claims, pendings = self._expiring()
        while leases and leases[lease := next(iter(leases))].expires <= now:
            self._leases.end(lease)
            self._counts["leases"] += 1
        while claims and claims[ticket := next(iter(claims))].expires <= now:
            self._claims.expire(ticket)
            self._counts["reservations"] += 1
        while pendings and (oldest := next(iter(pendings.values()))).expires <= now:
            self._claims.doom(oldest)
        if self._claims.aside and now >= self._poll_at:
            self._poll_at = now + self._limits.writer_poll_s
            writers = {aside.writer for aside in self._claims.aside.values()}
            alive = {writer: self.pool.writer_alive(writer) for writer in writers}
            for ticket in [ticket for ticket, aside in self._claims.aside.items() if not alive[aside.writer]]:
                self._claims.settle(ticket)
        self._records.flush()

    def _late(self, owner: Owner, ticket: int) -> None:
        """An owner resolves a reservation that has run out: it is done with the extents."""
        aside = self._claims.aside.get(ticket)
        if aside is not None and aside.owner == owner:
            self._claims.settle(ticket)
            self._records.flush()

    def _lease_limit_bytes(self) -> float:
        """Of the pool as it is meant to be, unless it cannot become so large."""
        size = self.pool.total_bytes if self.pool.growth_stopped is None else self.pool.ready_bytes
        return size * self._limits.leased_share

    def _issue(self, grant: Grant) -> Reservation:
        ticket = 0
        if grant.claim.parts:
            ticket = self._number()
            self._claims.add(ticket, grant.claim)
        self._records.flush()
        return Reservation(ticket, bytes(grant.states), grant.offsets)

    def _number(self) -> int:
        """A number of 63 bits that nobody can guess, and that names no lease or reservation yet."""
        while True:
            number = int.from_bytes(self._entropy.token(8), "little") >> 1
            claims = self._claims
            is_used = number in self._leases.by_id or number in claims.by_ticket or number in claims.aside
            if number and not is_used:
                return number
