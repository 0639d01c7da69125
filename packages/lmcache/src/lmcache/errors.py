"""Errors of the runtime: broken promises only. A miss, a full pool or a refused chunk is a value, never an exception.

LMCacheError
├── ConfigError        a setting is out of its bounds, or does not fit this machine
├── LayoutError        the engine's KV tensors are not understood, or do not fit the server's geometry
├── PoolError          L1 memory could not be obtained or adopted
│   └── PoolBusy       another process holds its lock
├── TierError          a tier's store did not do what was asked of it, or did not answer
├── WireError          a frame that is not ours, or a reply that does not belong to its request
│   ├── PeerRefused    the server answered with a typed error (``code`` and a sentence)
│   └── PeerSilent     no answer within the deadline, or the connection is gone
└── AttachError        this process cannot attach to the server's pool (other host, other version, no permission)
"""

from __future__ import annotations


class LMCacheError(Exception):
    """Base of everything the runtime raises on purpose; its text is one sentence for a person."""


class ConfigError(LMCacheError):
    """A setting is out of its bounds, or does not fit this machine."""


class LayoutError(LMCacheError):
    """The engine's KV tensors are not understood, or do not fit the server's geometry."""


class PoolError(LMCacheError):
    """L1 memory could not be obtained, locked or adopted."""


class PoolBusy(PoolError):
    """Another process holds the lock of the pool."""


class TierError(LMCacheError):
    """A tier's store did not do what was asked of it, or did not answer."""


class WireError(LMCacheError):
    """A frame that is not ours, or a reply that does not belong to its request."""


class PeerRefused(WireError):
    """The server answered with a typed error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class PeerSilent(WireError):
    """No answer within the deadline, or the connection is gone."""


class AttachError(LMCacheError):
    """This process cannot attach to the server's pool."""
