"""Values of the L1 cache: what its verbs answer, and its limits."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from lmcache.cache.quarantine import Spoiled
from lmcache.errors import LMCacheError

Owner = int
"""Instance id that the server issued; its epoch is inside it, so a process that attaches again is another owner."""

NO_EXTENT = (1 << 64) - 1
"""Offset that stands for "none" in a reservation."""

PAGE_BYTES = 4096
PIECE_BYTES = 64 << 20
"""No extent straddles a multiple of this: it is the unit in which workers register the pool with CUDA."""

NO_WRITER = (1 << 32) - 1
"""Writer slot of an owner that was never handed the pool's descriptor, and therefore cannot write."""


class IntegrityError(LMCacheError, AssertionError):
    """The cache's own books contradict each other: a bug, never a condition."""


class State(IntEnum):
    """Answer to one key of a reserve."""

    HELD = 0  # visible already
    GRANTED = 1
    BUSY = 2  # another writer is at it
    FULL = 3  # no memory that may be evicted


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to a lookup. Lists are flat, chunk-major then rank, for chunks ``first_chunk`` to ``num_chunks``."""

    num_chunks: int
    lease: int  # 0: nothing is pinned
    lease_s: float
    offsets: list[int]
    checksums: list[int]


@dataclass(slots=True)
class Reservation:
    """Answer to a reserve: one state a key, one offset a key and rank; ``ticket`` 0 when nothing was granted."""

    ticket: int
    states: bytes
    offsets: list[int]


@dataclass(frozen=True, slots=True)
class Writing:
    """A chunk to write to the tiers, under a lease of its own; an offset and a checksum a rank."""

    lease: int
    key: bytes
    origin: bytes
    extent_bytes: int
    offsets: list[int]
    checksums: list[int]


@dataclass(frozen=True, slots=True)
class Cleared:
    """Answer to a clear; entries that a lease or a reservation holds are kept."""

    num_entries: int
    num_kept: int


@dataclass(frozen=True, slots=True)
class Usage:
    """State and counters. Bytes of extents are as allocated: rounded up to whole pages."""

    total_bytes: int
    ready_bytes: int  # memory that exists; grows to the total
    used_bytes: int  # extents that hold or await a chunk
    leased_bytes: int
    set_aside_bytes: int  # part of used: reservations that expired or outlived a server while their writer lives
    num_entries: int  # visible
    num_leased_entries: int
    num_reserved_entries: int  # not yet visible
    num_leases: int
    num_reservations: int
    num_slots: int  # extents that the records file can describe
    num_unwritten: int  # entries that wait to be written to the tiers
    # counters since the start
    num_quarantined: int
    num_evicted: int
    num_refused_full: int  # chunks answered FULL
    num_shortened: int  # lookups whose answer was cut by the cap on leased bytes
    num_expired_leases: int
    num_expired_reservations: int
    num_adopted: int
    num_lost: int  # entries that were gone from L1 before the tiers had them
    growth_stopped: str | None  # why the pool stays smaller than asked
    quarantined: tuple[Spoiled, ...]  # the last of those counted by num_quarantined, the newest first


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of what owners may hold."""

    lease_s: float = 30.0
    reservation_s: float = 30.0
    leased_share: float = 0.5  # of the pool's bytes
    leases_max: int = 65_536
    inline_grow_bytes: int = PIECE_BYTES  # one reserve waits for this much allocation, or what one extent needs
    writer_poll_s: float = 1.0  # how often a set-aside extent's writer is asked for, while there is one
