"""A small world for the cache: files in memory, time by hand, and the books checked after every test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cache_worlds import DIRECTORY, MIB, OpenCache
from memory_files import ManualClock, MemoryFiles, SeededEntropy

from lmcache.cache import open_cache
from lmcache.cache.base import Limits
from lmcache.cache.store import Cache


@pytest.fixture
def files() -> MemoryFiles:
    return MemoryFiles()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def open_small(files: MemoryFiles, clock: ManualClock) -> Iterator[OpenCache]:
    """Opens a cache of so many MiB in the test's files; the last one opened is checked when the test is over."""
    opened: list[Cache] = []

    def open_it(
        mib: int = 64,
        *,
        persist: bool = False,
        limits: Limits | None = None,
        chunk_tokens: int = 256,
        directory: str = DIRECTORY,
    ) -> Cache:
        cache = open_cache(
            directory,
            mib * MIB,
            chunk_tokens,
            policy="LRU",
            persist=persist,
            files=files,
            clock=clock,
            entropy=SeededEntropy(len(opened)),
            limits=limits,
        )
        opened.append(cache)
        return cache

    yield open_it
    for cache in opened[-1:]:
        if cache.pool.growth_stopped != "closed":
            cache.check_integrity()


@pytest.fixture
def cache(open_small: OpenCache) -> Cache:
    """A cache of one piece: 64 MiB."""
    return open_small()
