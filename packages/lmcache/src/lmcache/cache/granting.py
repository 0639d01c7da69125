"""Extents for chunks that are about to be written: by a worker for its rank, by the cascade for all ranks at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from lmcache.cache.base import NO_EXTENT, Limits, Owner, State
from lmcache.cache.claims import Claim, Claims, Shape
from lmcache.cache.evict.base import Policy
from lmcache.cache.extents import Extents
from lmcache.cache.index import Index
from lmcache.cache.origins import NOBODY
from lmcache.cache.room import Room
from lmcache.keys import KEY_BYTES


@dataclass(slots=True)
class Grant:
    """What was granted, before it has a ticket. ``states``: one a key; ``offsets``: one a key and rank."""

    claim: Claim
    states: bytearray
    offsets: list[int] = field(default_factory=list)


class Granting:
    """Decides key by key whether it is held, being written, granted or does not fit."""

    def __init__(
        self, room: Room, extents: Extents, index: Index, claims: Claims, policy: Policy, limits: Limits
    ) -> None:
        self.num_refused = 0
        self._room = room
        self._extents = extents
        self._index = index
        self._claims = claims
        self._policy = policy
        self._limits = limits

    def reserve(self, owner: Owner, keys: bytes, rank: int, shape: Shape, origin: bytes, now: float) -> Grant:
        """For one rank, earlier chunks first. Once one is FULL, all later ones are: a prefix with a hole is useless."""
        size = self._extents.size_class(shape[1])
        links = [keys[start : start + KEY_BYTES] for start in range(0, len(keys), KEY_BYTES)]
        by_key, pending = self._index.by_key, self._claims.pending
        self._policy.touch([entry for key in reversed(links) if (entry := by_key.get(key)) is not None])
        states = bytearray(len(links))
        grant = Grant(Claim(owner, now + self._limits.reservation_s), states, [NO_EXTENT] * len(links))
        full = False
        self._room.begin(self._limits.inline_grow_bytes)
        for position, key in enumerate(links):
            other = pending.get(key)
            if key in by_key:
                states[position] = State.HELD
            elif other is not None and (rank in other.slots or other.shape != shape):
                states[position] = State.BUSY
            elif full or (slot := self._room.take(size, len(links) - position, origin)) is None:
                full = True
                states[position] = State.FULL
                self.num_refused += 1
                if other is not None:
                    self._claims.doom(other)
            else:
                states[position] = State.GRANTED
                grant.offsets[position] = self._index.offset[slot]
                self._claims.claim(grant.claim, key, rank, shape, slot)
        return grant

    def admit(self, owner: Owner, key: bytes, shape: Shape, now: float) -> Grant:
        """For all ranks of one chunk, or for none. What it belongs to is known once its header has been read."""
        world_size, extent_bytes = shape
        size = self._extents.size_class(extent_bytes)
        grant = Grant(Claim(owner, now + self._limits.reservation_s, promoted=True), bytearray(1))
        if key in self._index.by_key:
            grant.states[0] = State.HELD
            return grant
        if key in self._claims.pending:
            grant.states[0] = State.BUSY
            return grant
        self._room.begin(self._limits.inline_grow_bytes)
        for rank in range(world_size):
            slot = self._room.take(size, world_size - rank, NOBODY)
            if slot is None:
                self._claims.discard(grant.claim)
                grant.states[0] = State.FULL
                grant.claim.parts.clear()
                grant.offsets.clear()
                self.num_refused += 1
                return grant
            self._claims.claim(grant.claim, key, rank, shape, slot)
            grant.offsets.append(self._index.offset[slot])
        grant.states[0] = State.GRANTED
        return grant
