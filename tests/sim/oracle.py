"""What is true: which bytes were ever stored under which identity, and who is writing where."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256, shake_128

from .kernel import Violation


@dataclass(frozen=True)
class Written:
    """Bytes that some process is putting into the pool now."""

    inode: int
    start: int
    end: int


class Oracle:
    """Contents by identity. A *version* tells two computations of one chunk apart: both are right."""

    def __init__(self) -> None:
        self._issued: dict[tuple[bytes, int], set[bytes]] = {}
        self._writing: dict[object, Written] = {}
        self._versions = 0
        self.num_accepted = 0
        self.num_stored = 0

    def compute(self, key: bytes, rank: int, num_bytes: int) -> bytes:
        """The bytes that an engine computes for a chunk."""
        self._versions += 1
        seed = sha256(key + rank.to_bytes(4, "little") + self._versions.to_bytes(8, "little")).digest()
        return shake_128(seed).digest(num_bytes)

    def issue(self, key: bytes, rank: int, data: bytes) -> None:
        """An engine stores these bytes under this identity."""
        self._issued.setdefault((key, rank), set()).add(sha256(data).digest())
        self.num_stored += 1

    def is_right(self, key: bytes, rank: int, data: bytes) -> bool:
        """Whether somebody stored these bytes under this identity."""
        return sha256(data).digest() in self._issued.get((key, rank), ())

    def accept(self, who: str, key: bytes, rank: int, data: bytes) -> None:
        """An engine goes on with these bytes.

        Raises:
            Violation: nobody ever stored them under this identity.
        """
        self.num_accepted += 1
        if not self.is_right(key, rank, data):
            raise Violation(f"{who} accepted wrong bytes for chunk {key.hex()[:8]} of rank {rank}")

    def begin_write(self, who: object, where: Written) -> None:
        """A process writes to a part of the pool from now on.

        Raises:
            Violation: somebody else does already.
        """
        for other in self._writing.values():
            if other.inode == where.inode and other.start < where.end and where.start < other.end:
                raise Violation(f"an extent at {where.start} was granted twice")
        self._writing[who] = where

    def end_write(self, who: object) -> None:
        """It does so no more."""
        self._writing.pop(who, None)

    def writing(self, inode: int) -> list[Written]:
        """All writes into a pool."""
        return [where for where in self._writing.values() if where.inode == inode]
