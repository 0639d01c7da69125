"""What must hold after each turn of a core, and when everything has come to rest."""

from __future__ import annotations

from typing import Any

from lmcache.cache.base import PAGE_BYTES
from lmcache.cascade.guard import Guarded
from lmcache.cascade.run import Cascade
from lmcache.keys import checksum_seed
from lmcache.transfer import _native

from .books import Books
from .disk import Disk
from .kernel import Violation
from .memory import pool_inode
from .oracle import Oracle
from .server import INSTANCE, ROOT, CoreProcess


def expect(holds: bool, sentence: str) -> None:
    """Raise a violation."""
    if not holds:
        raise Violation(sentence)


class Watch:
    """Looks at one life of a core after each of its turns."""

    def __init__(self, core: CoreProcess, oracle: Oracle, salts: list[str]) -> None:
        self._core = core
        self._oracle = oracle
        self._salts = salts
        self._books = Books(core.cache, core.sessions, core.counters)
        self._hear_last_words(core.cache)
        self._used: dict[str, int] = {}
        self._seen: dict[bytes, int] = {}  # visible chunks -> offset of rank 0
        self._turns = 0
        self._is_new = True
        self.damaged: set[tuple[int, int]] = set()  # extents whose bytes were changed by nobody's code
        self.inode = pool_inode(core.files, f"{ROOT}/{INSTANCE}")

    def _hear_last_words(self, cache: Any) -> None:
        """What a process said is heard before its end is, whatever it has not read."""
        drop_owner = cache.drop_owner

        def watched(owner: object) -> None:
            for instance in self._core.sessions.instances():
                peer: Any = instance.peer
                if instance.id == owner and peer in self._core.core._ends.local._peers.values():
                    unheard = peer.stream.frames or peer.stream._socket.data
                    expect(not unheard, f"the last words of {instance} are not heard")
            drop_owner(owner)

        cache.drop_owner = watched

    def after_turn(self) -> None:
        """All that can be seen from the core's own books, and from who writes where.

        Raises:
            Violation, IntegrityError: something does not hold.
        """
        core = self._core
        cache = core.cache
        cache.check_integrity()
        self._is_new, self._turns = self._turns == 0, self._turns + 1
        expect(core.core.fault is None, f"the core says of itself: {core.core.fault}")
        expect(core.counters.faults == 0, "a request failed by a fault of the server")
        expect(core.counters.malformed == 0, "a message is not what was sent")
        self._books.check()
        self._check_memory()
        self._check_news()
        self._check_quotas()

    def _check_memory(self) -> None:
        cache = self._core.cache
        usage = cache.usage()
        held = cache._extents.check()
        sizes = {offset: cache._extents.piece_at(offset).size for offset in held}
        expect(sum(sizes.values()) == usage.used_bytes, "extents that are held are not the used bytes")
        expect(usage.used_bytes <= usage.ready_bytes <= usage.total_bytes, "more is used than there is")
        last = 0
        for offset in sorted(sizes):
            expect(offset >= last, f"extents overlap at {offset}")
            last = offset + sizes[offset]
        share = self._core.geometry.limits.leased_share
        expect(usage.leased_bytes <= share * usage.total_bytes, "leases pin more than their share")
        leased = [slot for entry in cache._room.leased for slot in cache._index.slots(entry)]
        spans = [(cache._index.offset[slot], sizes.get(cache._index.offset[slot], PAGE_BYTES)) for slot in leased]
        for where in self._oracle.writing(self.inode):
            for offset, size in spans:
                expect(
                    where.end <= offset or offset + size <= where.start, f"a leased extent at {offset} is written to"
                )

    def _check_news(self) -> None:
        """A chunk that has become visible in this turn holds what was stored under its key."""
        index, files = self._core.cache._index, self._core.files
        if index.by_key.keys() == self._seen.keys():
            return
        seen = {}
        for key, entry in index.by_key.items():
            slots = index.slots(entry)
            seen[key] = index.offset[slots[0]]
            if self._seen.get(key) == seen[key] or self._is_new:
                continue
            for rank, slot in enumerate(slots):
                data = files.read(self.inode, index.offset[slot], index.extent_bytes[entry])
                if (self.inode, index.offset[slot]) in self.damaged:
                    continue
                right = _native.checksum(data, checksum_seed(key, rank)) == index.checksum[slot]
                expect(right, f"chunk {key.hex()[:8]} is visible, and its bytes do not have its checksum")
                right = self._oracle.is_right(key, rank, data)
                expect(right, f"chunk {key.hex()[:8]} is visible with bytes that nobody stored under its key")
        self._seen = seen

    def _check_quotas(self) -> None:
        quotas = self._core.cache.quotas
        for salt in self._salts:
            tenant = self._core.tenants.id_of(salt)
            used, limit = quotas.used_bytes(tenant), quotas.limit_of(tenant)
            before = self._used.get(salt, 0)
            if limit is not None:
                expect(used <= max(limit, before), f"tenant {salt!r} takes {used} bytes of its {limit}")
            self._used[salt] = used


def at_rest(core: CoreProcess) -> None:
    """Engines have ended their requests: nobody holds anything, but for the cascade."""
    cascade = core.tiering.cascade
    leases = [lease for lease in core.cache._leases.by_id.values() if cascade is None or lease.owner != cascade.id]
    claims = [claim for claim in core.cache._claims.by_ticket.values() if cascade is None or claim.owner != cascade.id]
    expect(not leases, f"{len(leases)} leases are held at rest")
    expect(not claims, f"{len(claims)} reservations are held at rest")
    expect(len(core.tiering.promotions) == 0, f"{len(core.tiering.promotions)} promotions run at rest")


def nobody_left(core: CoreProcess) -> None:
    """In a world in which nothing stands still and no connection breaks, nobody gives the server up."""
    counters = core.counters
    expect(counters.detaches == 0, f"{counters.detaches} processes gave up a server that served all the time")
    expect(counters.unsent == 0, f"{counters.unsent} answers were not sent to processes that read all the time")


def all_gone(core: CoreProcess) -> None:
    """All clients are gone: only chunks that can be found are left, and those that wait for a rank until their time."""
    usage = core.cache.usage()
    expect(usage.num_leases == 0, f"{usage.num_leases} leases are held by nobody")
    expect(usage.num_reservations == 0, f"{usage.num_reservations} reservations are held by nobody")
    expect(usage.set_aside_bytes == 0, f"{usage.set_aside_bytes} bytes wait for writers that are dead")
    cache = core.cache
    visible = sum(cache._leases.entry_bytes(entry) for entry in cache._index.by_key.values())
    pending = sum(
        cache._extents.piece_at(cache._index.offset[slot]).size
        for waiting in cache._claims.pending.values()
        for slot in waiting.slots.values()
    )
    expect(visible + pending == usage.used_bytes, f"{usage.used_bytes - visible - pending} bytes leaked")


def cascade_at_rest(cascade: Cascade) -> None:
    """It has nothing to do, so it holds nothing."""
    expect(cascade._writer.used_bytes == 0, f"{cascade._writer.used_bytes} bytes of writes that are over count still")
    used = cascade._promoter._budget.used_bytes
    expect(used == 0, f"{used} bytes of reads that are over count still")
    for guarded in cascade._tiers:
        expect(not guarded._keys._locks, f"the tier {guarded.name} holds keys at rest")


def tier_at_rest(guarded: Guarded, disk: Disk, *, has_damage: bool) -> None:
    """What a tier knows it has, and nothing was found spoiled that nobody spoiled."""
    expect(has_damage or guarded.counts.spoiled == 0, f"{guarded.name} spoiled {guarded.counts.spoiled} objects itself")
    tier: Any = guarded.tier.tier  # type: ignore[attr-defined]
    if not guarded.is_up or (tier.kind == "FileL2Adapter" and not tier._is_known):
        return
    expect(not tier._catalog._coming and not tier._catalog._held, f"{guarded.name} holds places for nobody")
    if tier.kind == "FileL2Adapter" and not has_damage:
        names = {path.rpartition("/")[2] for path in disk.objects() if path.startswith(f"{tier.place}/")}
        known = {key.hex() for key in tier._catalog._slots}
        expect(known <= names, f"{guarded.name} lost {len(known - names)} objects")
        expect(names <= known, f"{guarded.name} keeps {len(names - known)} files that it does not know")
        expect(tier._catalog.num_bytes <= tier._capacity_bytes, f"{guarded.name} has more than its capacity")


def everything_written(core: CoreProcess, disk: Disk) -> None:
    """What L1 holds lies on the disk, too; not so what is larger than leases may pin of a pool that stayed small."""
    names = {path.rpartition("/")[2] for path in disk.objects()}
    cache = core.cache
    for key, entry in cache._index.by_key.items():
        if cache._leases.entry_bytes(entry) > cache._lease_limit_bytes():
            continue
        expect(key.hex() in names, f"chunk {key.hex()[:8]} was never written")
