"""Which visible entries the tiers below do not have yet, in the order in which they became visible."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Unwritten:
    """Entries that wait to be written. While ``counts`` is False (no tier takes writes) it stays empty.

    It is bounded by the index, and holds no memory of L1: an entry that is evicted before its turn is lost to the tiers
    and counted, never waited for.
    """

    def __init__(self) -> None:
        self.counts = False
        self.num_lost = 0
        self._waiting: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, entry: int) -> bool:
        return entry in self._waiting

    def __iter__(self) -> Iterator[int]:
        return iter(self._waiting)

    def add(self, entries: Iterable[int]) -> None:
        """Entries that became visible, or whose writing failed."""
        if self.counts:
            self._waiting.update(dict.fromkeys(entries))

    def take(self, entry: int) -> None:
        """This entry is being written."""
        self._waiting.pop(entry, None)

    def lose(self, entry: int) -> None:
        """This entry is gone."""
        if self._waiting.pop(entry, self) is None:
            self.num_lost += 1
