"""How much memory this process uses beyond what its books explain."""

from __future__ import annotations

import os

WEIGH_S = 0.1
"""How often to look; one look takes about 20 us."""

UNEXPLAINED_BYTES_MAX = 128 << 20
"""What requests under way may take, those that have not arrived whole among them."""

_ENTRY_BYTES = 2048  # of an entry in the books, at most


class Scale:
    """Weighs this process against its own weight at the first look, plus its entries."""

    def __init__(self) -> None:
        self._base_bytes: int | None = None

    def is_heavy(self, num_entries: int) -> bool:
        """Whether there is too much. Said once: the next look takes what it finds as the new normal, since freed memory
        does not all return to the system."""
        beyond = _private_bytes() - num_entries * _ENTRY_BYTES
        if self._base_bytes is None:
            self._base_bytes = beyond
        heavy = beyond > self._base_bytes + UNEXPLAINED_BYTES_MAX
        if heavy:
            self._base_bytes = None
        return heavy


def _private_bytes() -> int:
    """Resident memory that is not a file's: mapped records grow with use, and are no concern here."""
    with open("/proc/self/statm", "rb") as file:
        _, resident, shared, *_ = file.read().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")
