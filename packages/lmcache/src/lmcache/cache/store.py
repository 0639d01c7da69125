"""The L1 cache: what is held, by whom, and where. Knows nothing of messages; never touches a chunk's bytes.

Every verb leaves the records file telling the truth before it returns. No verb blocks, but for at most
``inline_grow_bytes`` of memory allocation in ``reserve``. Call ``sweep`` after each batch of verbs and wait no longer
than it says.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from lmcache.cache.adopt import adopt
from lmcache.cache.base import NO_EXTENT, NO_WRITER, Cleared, Found, Limits, Owner, Reservation, State, Usage
from lmcache.cache.claims import Claim, Claims, Pending
from lmcache.cache.evict.base import Policy
from lmcache.cache.extents import Extents
from lmcache.cache.index import Index
from lmcache.cache.integrity import check
from lmcache.cache.leases import Lease, Leases
from lmcache.cache.pool import Pool
from lmcache.cache.records import Records, slots_max
from lmcache.cache.room import Room
from lmcache.keys import KEY_BYTES
from lmcache.system import Clock, Entropy


class Cache:
    """Facade over index, extents, records, leases and reservations. One thread only, but ``pool`` may grow in
    another."""

    def __init__(
        self, pool: Pool, records: Records, policy: Policy, clock: Clock, limits: Limits, *, entropy: Entropy
    ) -> None:
        self.pool = pool
        self.policy = policy
        self._records = records
        self._clock = clock
        self._limits = limits
        self._entropy = entropy
        self._index = Index(slots_max(pool.total_bytes))
        self._extents = Extents(pool.total_bytes)
        self._extents.set_ready(pool.ready_bytes)
        self._room = Room(pool, self._extents, self._index, policy, records)
        self._leases = Leases(self._room, self._index, policy, records, limits)
        self._claims = Claims(self._room, self._index, records)
        self._wake = 0.0  # nothing can run out before
        self._poll_at = 0.0
        self._counts = dict.fromkeys(("refused", "shortened", "leases", "reservations", "adopted"), 0)
        self._counts["adopted"] = adopt(pool, records, self._index, self._extents, policy, self._claims)

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

    def peek(self, keys: bytes) -> bytes:
        """A byte for each of ``keys`` (32 bytes each), 1 where the chunk is held; nothing is touched."""
        by_key = self._index.by_key
        return bytes(keys[start : start + KEY_BYTES] in by_key for start in range(0, len(keys), KEY_BYTES))

    def release(self, owner: Owner, lease: int, failed: Sequence[int] = ()) -> bool:
        """End a lease; False when it is not this owner's or is gone.

        ``failed``: chunks whose bytes failed the check, counted from the lease's first chunk. They leave the index
        now, and their extents are free when no lease holds them.
        """
        held = self._leases.by_id.get(lease)
        if held is None or held.owner != owner:
            return False
        self._leases.quarantine(lease, failed)
        self._leases.end(lease)
        self._records.flush()
        return True

    def reserve(self, owner: Owner, keys: bytes, *, rank: int, world_size: int, extent_bytes: int) -> Reservation:
        """An extent for each chunk that is neither held nor written by somebody else, earlier chunks first.

        Once one is FULL, all later ones are: a prefix with a hole is useless.

        Raises:
            LayoutError: this pool can never hold an extent of that size.
            ValueError: the rank is not below the world size.
        """
        if not 0 <= rank < world_size <= 0xFFFF:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        size = self._extents.size_class(extent_bytes)
        links = [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]
        by_key, pending = self._index.by_key, self._claims.pending
        self.policy.touch([entry for key in reversed(links) if (entry := by_key.get(key)) is not None])
        states = bytearray(len(links))
        offsets = [NO_EXTENT] * len(links)
        claim = Claim(owner, rank, self._clock.now() + self._limits.reservation_s)
        shape = (world_size, extent_bytes)
        full = False
        self._room.begin(self._limits.inline_grow_bytes)
        for position, key in enumerate(links):
            other = pending.get(key)
            if key in by_key:
                states[position] = State.HELD
            elif other is not None and (rank in other.slots or other.shape != shape):
                states[position] = State.BUSY
            elif full or (slot := self._room.take(size, len(links) - position)) is None:
                full = True
                states[position] = State.FULL
                self._counts["refused"] += 1
                if other is not None:
                    self._claims.doom(other)
            else:
                states[position] = State.GRANTED
                offsets[position] = self._index.offset[slot]
                self._claims.claim(claim, key, shape, slot)
        ticket = 0
        if claim.parts:
            ticket = self._number()
            self._claims.add(ticket, claim)
        self._records.flush()
        return Reservation(ticket, bytes(states), offsets)

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
        num_published = sum(not pending.doomed for pending, _ in claim.parts)
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
        now = self._clock.now()
        if now >= self._wake:
            self._expire(now)
        leases, claims, pendings = self._expiring()
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
        check(self._index, self._extents, self._records, self._leases, self._claims, self.policy, self._room)

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
            num_quarantined=leases.num_quarantined,
            num_evicted=self._room.num_evicted,
            num_refused_full=counts["refused"],
            num_shortened=counts["shortened"],
            num_expired_leases=counts["leases"],
            num_expired_reservations=counts["reservations"],
            num_adopted=counts["adopted"],
            growth_stopped=self.pool.growth_stopped,
        )

    def close(self, *, persist: bool) -> None:
        """End of this cache's life: nothing may be called after it. Without ``persist`` its files are removed."""
        self._records.flush()
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

    def _number(self) -> int:
        """A number of 63 bits that nobody can guess, and that names no lease or reservation yet."""
        while True:
            number = int.from_bytes(self._entropy.token(8), "little") >> 1
            used = (self._leases.by_id, self._claims.by_ticket, self._claims.aside)
            if number and not any(number in held for held in used):
                return number
