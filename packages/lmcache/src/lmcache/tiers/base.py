"""What a tier is: slower storage below L1 that keeps whole objects by key, and nothing else.

An *object* is one chunk with all its ranks: a header (one page, more beyond 400 ranks) and one extent a rank, each
rounded up to whole pages (``objects.py`` has the format; a tier may read the header, and never judges the rest).

**What the framework guarantees**

- All calls come from one event loop, after ``open`` has returned and before ``close`` is called.
- ``parts`` are writable, C-contiguous memoryviews of bytes, page-aligned and whole pages long: the header first, then
  the extents, which lie in the L1 pool itself. They belong to the tier until its call is over, and not a moment longer.
- There is at most one ``put``, ``get`` or ``delete`` of a key at a time, and at most ``concurrency`` calls altogether,
  ``contains`` and ``usage`` apart.
- A call is never cancelled. One that takes longer than its deadline counts as failed and its result is ignored, but its
  parts stay its own until it returns; a tier whose calls fail is left alone for a while, then tried again.

**What an adapter owes**

- Its constructor checks options and does nothing else: no connection, no file, no import of its library.
- ``put`` is atomic: a ``get`` sees all bytes of one ``put`` or no object. What it answered True for survives the death
  of this process, in every tier whose ``survives`` is True.
- ``get`` fills all parts or answers False; of a False, the parts' content does not matter.
- An object may vanish at any time (eviction, another server, a person): that is absence, not an error.
- The event loop is never held for longer than a millisecond: blocking libraries go to threads.
- A store that fails raises ``TierError`` with one sentence, without secrets. Being full is no failure.
- Every call ends some day, even if the store never answers: sockets have timeouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

CALL_S = 10.0
"""Socket timeout that adapters use unless their option ``timeout_s`` says otherwise."""


@dataclass(frozen=True, slots=True)
class Share:
    """Whose object a ``put`` brings.

    ``limit_bytes``: what this tenant's objects may take in the tier together, this one included; None where nothing
    limits it. A tier that cannot count a tenant's bytes answers False to a limited put.
    """

    tenant: bytes  # 16 bytes, ``keys.tenant_id``
    limit_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tier holds; None is "cannot tell". Bytes count headers and padding."""

    num_objects: int | None = None
    used_bytes: int | None = None
    capacity_bytes: int | None = None
    num_slots: int | None = None  # of tiers that have a fixed number of places
    num_evicted: int = 0  # since ``open``
    tenant_bytes: dict[bytes, int] | None = None
    problem: str | None = None  # why it works less well than it should, though calls succeed


class Tier(Protocol):
    """One tier. Keys are 32 bytes."""

    kind: str  # as people see it: "FileL2Adapter"
    backend: str  # what is behind it: "posix", "redis", "s3"
    place: str | None  # a path or an address, without secrets
    survives: bool  # whether objects outlive this process
    concurrency: int  # calls at a time that make it fastest

    async def open(self) -> None:
        """Get ready; called again, after a while, if it raises TierError."""

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each object, header included; 0 where there is none."""

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """Store an object, in place of one of the same key. False: no room for it."""

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """Read an object into ``parts``. False: there is none, or it has another length than the parts together."""

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Forget objects; absent ones are fine."""

    async def usage(self) -> Usage:
        """State, as far as it is cheap to know."""

    async def close(self) -> None:
        """Let everything go; the objects stay. Called once, also after an ``open`` that failed."""
