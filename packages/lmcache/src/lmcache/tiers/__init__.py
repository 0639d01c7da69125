"""Slower storage below L1, one file an adapter; other packages add theirs by the entry points ``lmcache.tiers``."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Mapping

from lmcache.errors import ConfigError
from lmcache.tiers.base import Tier
from lmcache.tiers.options import Options

BUILTIN = {
    "file": "lmcache.tiers.file:FileTier",
    "memory": "lmcache.tiers.memory:MemoryTier",
    "mooncake": "lmcache.tiers.mooncake:MooncakeTier",
    "nixl": "lmcache.tiers.nixl:NixlTier",
    "null": "lmcache.tiers.null:NullTier",
    "object": "lmcache.tiers.object:ObjectTier",
    "redis": "lmcache.tiers.redis:RedisTier",
}
ENTRY_POINTS = "lmcache.tiers"


def make_tier(values: Mapping[str, object]) -> Tier:
    """The adapter that ``values["type"]`` names, its options checked; nothing is opened yet. With ``seal``, sealed.

    Raises:
        ConfigError: there is no such adapter, it is not installed, or an option is wrong.
    """
    options = Options(values)
    path = BUILTIN.get(options.type)
    if path is not None:
        module, _, name = path.partition(":")
        adapter = getattr(importlib.import_module(module), name)
    else:
        found = importlib.metadata.entry_points(group=ENTRY_POINTS, name=options.type)
        if not found:
            others = importlib.metadata.entry_points(group=ENTRY_POINTS).names
            raise ConfigError(f"--l2-adapter: unknown type {options.type!r}; known: {', '.join([*BUILTIN, *others])}")
        try:
            adapter = next(iter(found)).load()
        except Exception as error:
            raise options.error(f"cannot be loaded: {type(error).__name__}: {error}") from None
    is_sealed, seal = "seal" in values, options.table("seal")
    tier: Tier = adapter(options)
    options.finish()
    if not is_sealed:
        return tier
    from lmcache.tiers.sealed import SealedTier
    from lmcache.tiers.sealed_keys import read_keys

    options.require("cryptography", "seal")
    return SealedTier(tier, read_keys(options, seal))
