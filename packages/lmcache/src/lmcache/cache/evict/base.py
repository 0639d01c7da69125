"""What an eviction policy is: an order over entries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol


class Policy(Protocol):
    """Order in which visible entries go. Entries are small integers from 1 up, reused after ``remove``.

    Sequences are in the order of going: of a prompt, the last chunk comes first, because a prefix with a hole is
    useless. The store skips entries that are leased; a policy need not know of leases.
    """

    name: str

    def insert(self, entries: Sequence[int]) -> None:
        """New entries."""

    def touch(self, entries: Sequence[int]) -> None:
        """Entries that were asked for; one may occur twice."""

    def remove(self, entry: int) -> None:
        """An entry is gone."""

    def victims(self) -> Iterator[int]:
        """Entries in the order of going; nothing may be changed during the iteration."""
