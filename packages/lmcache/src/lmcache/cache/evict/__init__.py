"""Eviction policies by name."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.cache.evict.base import Policy
from lmcache.cache.evict.lru import LRU
from lmcache.errors import ConfigError

POLICIES: dict[str, Callable[[], Policy]] = {"LRU": LRU}


def make_policy(name: str) -> Policy:
    """A new policy; case does not matter.

    Raises:
        ConfigError: there is none of that name; the text lists those there are.
    """
    try:
        return POLICIES[name.upper()]()
    except KeyError:
        raise ConfigError(f"unknown eviction policy {name!r}; known: {', '.join(POLICIES)}") from None
