"""What the core and its cascade say to each other. Only the process that has enlisted may send these.

The cascade always has one ``Orders`` under way. The core keeps it until there is something to do, or its time is over,
and answers with ``Work``: chunks to write down to the tiers, prompts to look for in them, and what to leave off.
"""

from __future__ import annotations

import msgspec

from lmcache.wire.message import Message

ORDERS_S_MAX = 30.0


class Enlist(Message, frozen=True, tag="enlist"):
    """This attached process is the cascade, from now on instead of any before; ``token`` is the service process's."""

    token: bytes
    write_back: bool = False  # chunks are written when L1 needs their room soon, not at once
    read_only: bool = False  # nothing is ever written


class Orders(Message, frozen=True, tag="orders"):
    """What is there to do? Replaces an unanswered one, which is answered empty."""

    wait_s: float  # how long the core may keep this question
    write_bytes: int  # extents that the cascade can take on now; 0: no writes


class Write(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One chunk to write, leased to the cascade until ``Written``."""

    lease: int
    key: bytes
    origin: bytes  # tenant (16), namespace (16), layout (8)
    extent_bytes: int
    offsets: bytes  # uint64 a rank
    checksums: bytes  # uint64 a rank
    limit_bytes: int  # of the tenant in each tier; -1: none


class Wanted(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A prompt whose chunks from ``keys`` on L1 lacks."""

    promotion: int
    world_size: int
    keys: bytes


class Work(Message, frozen=True, tag="work", gc=True):
    """Answer to Orders."""

    writes: tuple[Write, ...] = ()
    wanted: tuple[Wanted, ...] = ()
    cancelled: tuple[int, ...] = ()  # promotions that nobody waits for any more
    spoiled: bytes = b""  # keys whose bytes failed their check at use: no tier may keep them


class Written(Message, frozen=True, tag="written"):
    """A ``Write`` is over; its lease ends. ``kept``: every tier that takes writes has it, or needs it no more."""

    lease: int
    kept: bool


class Admit(Message, frozen=True, tag="admit"):
    """Asks for extents of all ranks for chunks that come from a tier."""

    keys: bytes
    world_size: int
    extent_bytes: int  # whole pages


class Admitted(Message, frozen=True, tag="admitted"):
    """Answer to Admit: as ``Granted``, but a ticket a key, and ``world_size`` offsets a key."""

    states: bytes
    tickets: bytes  # uint64 a key, 0 where nothing was granted
    offsets: bytes


class Publish(Message, frozen=True, tag="publish"):
    """The extents of a ticket hold a chunk that was verified against these checksums. Answered by ``Committed``: 0
    chunks where the tenant's limit or an end of the reservation forbids it."""

    ticket: int
    origin: bytes
    extent_bytes: int  # as the engine that stored it asked
    checksums: bytes  # uint64 a rank
    unwritten: bool  # a tier above the one that had it lacks it


class Promoted(Message, frozen=True, tag="promoted"):
    """A ``Wanted`` is over, whatever came of it."""

    promotion: int
    num_found: int  # leading chunks that a tier had
    num_promoted: int  # of which became visible
