"""A tier that keeps nothing: what everything beside a tier costs can be measured with it."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.tiers.base import Share, Usage
from lmcache.tiers.options import Options


class NullTier:
    """The adapter of type ``null``. It has no options."""

    kind = "NullL2Adapter"
    backend = "null"
    place = None
    survives = False
    concurrency = 64

    def __init__(self, options: Options) -> None:
        """Nothing to read."""

    async def open(self) -> None:
        """See ``Tier``."""

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """See ``Tier``."""
        return [0] * len(keys)

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:  # noqa: ARG002
        """See ``Tier``."""
        return False

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:  # noqa: ARG002
        """See ``Tier``."""
        return False

    async def delete(self, keys: Sequence[bytes]) -> None:
        """See ``Tier``."""

    async def usage(self) -> Usage:
        """See ``Tier``."""
        return Usage(num_objects=0, used_bytes=0, capacity_bytes=0, tenant_bytes={})

    async def close(self) -> None:
        """See ``Tier``."""
