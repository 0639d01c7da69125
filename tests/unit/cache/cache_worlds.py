"""Words shared by the cache's tests."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.cache.base import State
from lmcache.cache.store import Cache

MIB = 1 << 20
ROOT = "/dev/shm/lmcache-1000"
DIRECTORY = f"{ROOT}/5555"

OpenCache = Callable[..., Cache]


def keys(first: int, end: int) -> bytes:
    """Keys of the chunks numbered so."""
    return b"".join(number.to_bytes(32, "big") for number in range(first, end))


def store(cache: Cache, first: int, end: int, *, owner: int = 1, extent_bytes: int = MIB) -> bytes:
    """Reserve and commit chunks on one rank; a chunk's checksum is its number. Returns the states."""
    reservation = cache.reserve(owner, keys(first, end), rank=0, world_size=1, extent_bytes=extent_bytes)
    numbers = zip(range(first, end), reservation.states, strict=True)
    granted = [number for number, state in numbers if state == State.GRANTED]
    if granted:
        assert cache.commit(owner, reservation.ticket, granted) == len(granted)
    return reservation.states


def held(cache: Cache, first: int, end: int) -> list[int]:
    """Which of these chunks are visible, each asked for alone and without a lease (asking touches)."""
    return [number for number in range(first, end) if cache.lookup(9, keys(number, number + 1), lease=False).num_chunks]
