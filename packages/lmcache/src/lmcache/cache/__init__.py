"""L1: the memory that chunks are kept in. See ``store.Cache`` for its verbs."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache.cache.base import Limits
    from lmcache.cache.store import Cache
    from lmcache.system import Clock, Entropy, Files


def open_cache(
    directory: str,
    total_bytes: int,
    chunk_tokens: int,
    *,
    policy: str,
    persist: bool,
    files: Files,
    clock: Clock,
    entropy: Entropy,
    limits: Limits | None = None,
    has_tiers: bool = False,
) -> Cache:
    """The cache in a directory, with what an earlier server left there.

    Raises:
        ConfigError: unknown policy.
        PoolError: the directory is in use or not safe, or the pool cannot be set up.
    """
    # Here, since the service process needs a part of this package only, and starts in a quarter of a second.
    from lmcache.cache.base import Limits
    from lmcache.cache.evict import make_policy
    from lmcache.cache.opening import open_pool
    from lmcache.cache.store import Cache

    order = make_policy(policy)
    pool, records = open_pool(directory, total_bytes, chunk_tokens, files, persist=persist)
    return Cache(pool, records, order, clock, limits or Limits(), entropy=entropy, has_tiers=has_tiers)
