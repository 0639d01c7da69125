"""A random life of the cache against a model of what it promised, with crashes in between."""

from __future__ import annotations

from dataclasses import dataclass

from cache_worlds import DIRECTORY, MIB
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from memory_files import Killed, ManualClock, MemoryFiles, SeededEntropy

from lmcache.cache import open_cache
from lmcache.cache.base import NO_EXTENT, State
from lmcache.cache.store import Cache

TENANTS = [bytes([number]) * 16 for number in range(3)]
CASCADE = 99
SHAPES = [(1, 4 * MIB), (2, 10 * MIB), (1, 24 * MIB - 5)]
NUM_OWNERS = 4

Key = bytes


@dataclass
class Writing:
    """An extent that some process may be writing."""

    owner: int
    offset: int
    length: int


@dataclass
class Ticket:
    owner: int
    rank: int
    world_size: int
    keys: list[Key]
    writing: list[Writing]
    promoted: bool = False


@dataclass
class Pinned:
    owner: int
    keys: list[Key]
    extents: list[tuple[int, int]]


class CacheLife(RuleBasedStateMachine):
    """``known``: (key, rank) -> checksums ever committed for it; ``writing``: extents with a living writer."""

    def __init__(self) -> None:
        super().__init__()
        self.files = MemoryFiles(230 * MIB)
        self.clock = ManualClock()
        self.descriptors: dict[int, int] = {}
        self.tickets: dict[int, Ticket] = {}
        self.leases: dict[int, Pinned] = {}
        self.ghosts: list[Writing] = []  # tickets are over, the writer lives
        self.known: dict[tuple[Key, int], set[int]] = {}
        self.limits: dict[bytes, int] = {}
        self.next_checksum = 1
        self.life = 0
        self.generation = 0
        self.open()

    def open(self) -> None:
        self.life += 1
        self.cache: Cache = open_cache(
            DIRECTORY, 200 * MIB, 256, policy="LRU", persist=False, files=self.files, clock=self.clock,
            entropy=SeededEntropy(self.life), has_tiers=True,
        )  # fmt: skip
        for index in (*range(NUM_OWNERS), CASCADE):
            self.attach(index)
        for tenant, limit in self.limits.items():
            self.cache.quotas.set_limit(tenant, limit)

    def owner(self, index: int) -> int:
        return self.life * 1000 + index

    def attach(self, index: int) -> None:
        descriptor, slot = self.cache.pool.grant_descriptor()
        self.cache.attach_writer(self.owner(index), slot)
        self.descriptors[self.owner(index)] = descriptor

    def holds_unseen(self) -> bool:
        """Chunks that lack a rank, and extents whose grant was never answered before a crash, hold memory too."""
        usage = self.cache.usage()
        return bool(usage.set_aside_bytes or usage.num_reserved_entries)

    def visible(self) -> dict[Key, tuple[int, ...]]:
        """Chunk -> checksums, asked in the cache's own order so that asking changes no order."""
        found = {}
        order = [self.cache._index.keys[entry] for entry in self.cache.policy.victims()]
        for key in order:
            found[key] = tuple(self.cache.lookup(0, key, lease=False).checksums)
        return found

    @rule(family=st.sampled_from([0, 1, 2]), start=st.integers(0, 30), num=st.integers(1, 12),
          index=st.integers(0, NUM_OWNERS - 1), rank=st.integers(0, 1), tenant=st.sampled_from(TENANTS))  # fmt: skip
    def reserve(self, family: int, start: int, num: int, index: int, rank: int, tenant: bytes = TENANTS[0]) -> None:
        world_size, extent_bytes = SHAPES[family]
        rank = min(rank, world_size - 1)
        links = [bytes([family]) + number.to_bytes(31, "big") for number in range(start, start + num)]
        owner = self.owner(index)
        reservation = self.cache.reserve(
            owner,
            b"".join(links),
            rank=rank,
            world_size=world_size,
            extent_bytes=extent_bytes,
            origin=tenant + bytes(24),
        )
        states = list(reservation.states)
        if State.FULL in states:
            assert State.GRANTED not in states[states.index(State.FULL) :]
        pinned = [extent for lease in self.leases.values() for extent in lease.extents]
        taken = [(w.offset, w.length) for t in self.tickets.values() for w in t.writing] + pinned
        taken += [(w.offset, w.length) for w in self.ghosts]
        writing = []
        for state, offset in zip(states, reservation.offsets, strict=True):
            assert (offset != NO_EXTENT) == (state == State.GRANTED)
            if state == State.GRANTED:
                assert offset // (64 * MIB) == (offset + extent_bytes - 1) // (64 * MIB), "straddles a piece"
                assert offset + extent_bytes <= self.cache.pool.ready_bytes
                assert all(offset + extent_bytes <= o or o + n <= offset for o, n in taken), "extent is in use"
                writing.append(Writing(owner, offset, extent_bytes))
                taken.append((offset, extent_bytes))
        granted = [key for key, state in zip(links, states, strict=True) if state == State.GRANTED]
        assert bool(reservation.ticket) == bool(granted)
        if granted:
            self.keeps_its_limit(tenant)
            self.tickets[reservation.ticket] = Ticket(owner, rank, world_size, granted, writing)
        elif State.FULL in states and not taken and not self.holds_unseen() and tenant not in self.limits:
            raise AssertionError("refused although nothing is held")

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.tickets)))
        ticket = self.tickets.pop(number)
        checksums = list(range(self.next_checksum, self.next_checksum + len(ticket.keys)))
        self.next_checksum += len(checksums)
        for key, checksum in zip(ticket.keys, checksums, strict=True):
            self.known.setdefault((key, ticket.rank), set()).add(checksum)
        if ticket.promoted:
            self.publish(number, ticket, checksums, tenant=data.draw(st.sampled_from(TENANTS)))
            return
        num = self.cache.commit(ticket.owner, number, checksums)
        assert num is not None
        if ticket.world_size == 1:
            assert num == len(ticket.keys)
            assert all(self.cache.lookup(0, key, lease=False).num_chunks for key in ticket.keys)

    def publish(self, number: int, ticket: Ticket, checksums: list[int], tenant: bytes) -> None:
        """A chunk from a tier becomes visible with all its ranks, or its tenant's limit forbids it."""
        (key,) = set(ticket.keys)
        for rank, checksum in enumerate(checksums):
            self.known.setdefault((key, rank), set()).add(checksum)
        num = self.cache.publish(
            ticket.owner, number, checksums, origin=tenant + bytes(24), extent_bytes=ticket.writing[0].length
        )
        assert num == 1 or (num == 0 and tenant in self.limits)
        assert bool(self.cache.lookup(0, key, lease=False).num_chunks) == bool(num)
        if num:
            self.keeps_its_limit(tenant)

    def keeps_its_limit(self, tenant: bytes) -> None:
        limit = self.limits.get(tenant)
        assert limit is None or self.cache.quotas.used_bytes(tenant) <= limit, "a tenant has more than its limit"

    @rule(family=st.sampled_from([0, 1, 2]), number=st.integers(0, 40))
    def admit(self, family: int, number: int) -> None:
        """The cascade gets extents of all ranks or none."""
        world_size, length = SHAPES[family]
        extent_bytes = -(-length // 4096) * 4096
        key = bytes([family]) + number.to_bytes(31, "big")
        owner = self.owner(CASCADE)
        granted = self.cache.admit(owner, key, world_size=world_size, extent_bytes=extent_bytes)
        assert bool(granted.ticket) == (granted.states[0] == State.GRANTED)
        assert len(granted.offsets) == (world_size if granted.ticket else 0)
        if granted.ticket:
            pinned = [extent for lease in self.leases.values() for extent in lease.extents]
            taken = [(w.offset, w.length) for t in self.tickets.values() for w in t.writing] + pinned
            taken += [(w.offset, w.length) for w in self.ghosts]
            for offset in granted.offsets:
                assert all(offset + extent_bytes <= o or o + n <= offset for o, n in taken), "extent is in use"
            writing = [Writing(owner, offset, length) for offset in granted.offsets]
            self.tickets[granted.ticket] = Ticket(owner, 0, world_size, [key] * world_size, writing, promoted=True)

    @rule(num_bytes=st.sampled_from([1, 8 * MIB, 60 * MIB]), from_old_end=st.booleans())
    def take_writes(self, num_bytes: int, from_old_end: bool) -> None:
        """The cascade is given chunks that are visible, each pinned until it says what became of it."""
        for writing in self.cache.take_writes(self.owner(CASCADE), num_bytes, from_old_end=from_old_end):
            assert self.cache.peek(writing.key) == b"\1"
            extents = [(offset, writing.extent_bytes) for offset in writing.offsets]
            self.leases[writing.lease] = Pinned(self.owner(CASCADE), [writing.key], extents)

    @precondition(lambda self: any(lease.owner == self.owner(CASCADE) for lease in self.leases.values()))
    @rule(data=st.data(), kept=st.booleans())
    def written(self, data: st.DataObject, kept: bool) -> None:
        mine = sorted(number for number, lease in self.leases.items() if lease.owner == self.owner(CASCADE))
        number = data.draw(st.sampled_from(mine))
        before = self.cache.num_unwritten
        key = self.leases.pop(number).keys[0]
        assert self.cache.written(self.owner(CASCADE), number, kept=kept)
        if not kept and self.cache.peek(key) == b"\1":
            assert self.cache.num_unwritten >= before
        assert not self.cache.written(self.owner(CASCADE), number, kept=kept), "a lease ends once"

    @rule(tenant=st.sampled_from(TENANTS[1:]), limit=st.sampled_from([None, 0, 30 * MIB, 90 * MIB]))
    def set_limit(self, tenant: bytes, limit: int | None) -> None:
        self.cache.quotas.set_limit(tenant, limit)
        if limit is None:
            self.limits.pop(tenant, None)
        else:
            self.limits[tenant] = limit

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.tickets)))
        assert self.cache.abort(self.tickets.pop(number).owner, number)

    @rule(family=st.sampled_from([0, 1, 2]), start=st.integers(0, 30), num=st.integers(1, 12),
          index=st.integers(0, NUM_OWNERS - 1), first=st.integers(0, 3), lease=st.booleans())  # fmt: skip
    def lookup(self, family: int, start: int, num: int, index: int, first: int, lease: bool) -> None:
        world_size, extent_bytes = SHAPES[family]
        links = [bytes([family]) + number.to_bytes(31, "big") for number in range(start, start + num)]
        found = self.cache.lookup(self.owner(index), b"".join(links), lease=lease, first_chunk=first)
        answered = links[first : found.num_chunks]
        assert len(found.offsets) == len(found.checksums) == len(answered) * world_size
        for position, checksum in enumerate(found.checksums):
            key, rank = answered[position // world_size], position % world_size
            assert checksum in self.known[key, rank], "a checksum that nobody committed"
        assert bool(found.lease) == (lease and bool(answered))
        if found.lease:
            extents = [(offset, extent_bytes) for offset in found.offsets]
            self.leases[found.lease] = Pinned(self.owner(index), answered, extents)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), failed=st.lists(st.integers(0, 12), max_size=3))
    def release(self, data: st.DataObject, failed: list[int]) -> None:
        number = data.draw(st.sampled_from(sorted(self.leases)))
        lease = self.leases.pop(number)
        assert self.cache.release(lease.owner, number, failed) is not None
        for position in failed:
            if position < len(lease.keys):
                assert not self.cache.lookup(0, lease.keys[position], lease=False).num_chunks

    @rule(index=st.integers(0, NUM_OWNERS - 1))
    def owner_dies(self, index: int) -> None:
        owner = self.owner(index)
        self.files.exit(self.descriptors.pop(owner))
        self.cache.drop_owner(owner)
        self.tickets = {number: ticket for number, ticket in self.tickets.items() if ticket.owner != owner}
        self.leases = {number: lease for number, lease in self.leases.items() if lease.owner != owner}
        self.ghosts = [ghost for ghost in self.ghosts if ghost.owner != owner]
        self.attach(index)

    @rule(data=st.data())
    def old_writer_exits(self, data: st.DataObject) -> None:
        old = sorted({ghost.owner for ghost in self.ghosts if ghost.owner < self.life * 1000})
        if old:
            owner = data.draw(st.sampled_from(old))
            self.files.exit(self.descriptors.pop(owner))
            self.ghosts = [ghost for ghost in self.ghosts if ghost.owner != owner]
            self.time_passes(1.0)

    @rule(seconds=st.sampled_from([0.5, 29.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock.seconds += seconds
        self.cache.sweep()
        self.leases = {number: lease for number, lease in self.leases.items() if number in self.cache._leases.by_id}
        for number in [number for number in self.tickets if number not in self.cache._claims.by_ticket]:
            self.ghosts += self.tickets.pop(number).writing
        usage = self.cache.usage()
        assert (usage.num_leases, usage.num_reservations) == (len(self.leases), len(self.tickets))

    @rule()
    def clear(self) -> None:
        kept = {key for lease in self.leases.values() for key in lease.keys}
        self.cache.clear()
        assert set(self.visible()) <= kept

    @rule()
    def crash(self) -> None:
        """Between two verbs: what was visible is found again, in the same order of eviction but for touches."""
        before = self.visible()
        self.restart()
        assert self.visible() == before

    @rule(num_writes=st.integers(0, 3), torn_bytes=st.integers(0, 600), start=st.integers(0, 30),
          num=st.integers(1, 12), do_commit=st.booleans())  # fmt: skip
    def crash_in_a_write(self, num_writes: int, torn_bytes: int, start: int, num: int, do_commit: bool) -> None:
        """Inside a verb: nothing is found that was not visible before or being committed."""
        before = self.visible()
        attempted: list[Key] = []
        self.files.kill_at(num_writes, torn_bytes)
        try:
            if do_commit and self.tickets:
                number = next(iter(self.tickets))
                ticket = self.tickets.pop(number)  # its writer is done, whatever comes of the commit
                attempted = ticket.keys
                for key in attempted:
                    self.known.setdefault((key, ticket.rank), set()).add(77)
                if ticket.promoted:
                    for rank in range(ticket.world_size):
                        self.known.setdefault((ticket.keys[0], rank), set()).add(77)
                    self.publish(number, ticket, [77] * ticket.world_size, TENANTS[0])
                else:
                    self.cache.commit(ticket.owner, number, [77] * len(ticket.keys))
            else:
                self.reserve(2, start, num, 0, 0)
                self.reserve(0, start, num, 1, 0)
        except Killed:
            pass
        self.restart()
        after = self.visible()
        for key, checksums in after.items():
            assert before.get(key) == checksums or (key in attempted and 77 in checksums)

    def restart(self) -> None:
        for ticket in self.tickets.values():
            self.ghosts += ticket.writing
        self.tickets.clear()
        self.leases.clear()
        self.files.die()
        self.open()

    @invariant()
    def books_agree(self) -> None:
        self.cache.check_integrity()
        assert self.cache.usage().leased_bytes <= 100 * MIB

    @invariant()
    def leased_chunks_stay(self) -> None:
        for lease in self.leases.values():
            assert all(self.cache._extents.check().get(offset) is not None for offset, _ in lease.extents)


CacheLife.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None, print_blob=False)
TestTheCacheKeepsItsPromisesInAnyOrderOfEvents = CacheLife.TestCase
