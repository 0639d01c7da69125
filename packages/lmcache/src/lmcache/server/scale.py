"""How much memory this process uses beyond what its books explain."""

from __future__ import annotations

import os

WEIGH_S = 0.1
"""How often to look: all that an idle core does."""

UNEXPLAINED_BYTES_MAX = 128 << 20
"""What requests under way may take, those that have not arrived whole among them."""

_STATM_BYTES_MAX = 256
_ENTRY_BYTES = 2048  # of an entry in the books, at most


class Scale:
    """Weighs this process against its own weight at the first look, plus its entries."""

    def __init__(self) -> None:
        self._base_bytes: int | None = None
        self._statm: int | None = None  # kept open: opening it would be half of the work
        self._page_bytes = os.sysconf("SC_PAGESIZE")

    def is_heavy(self, num_entries: int, held_bytes: int) -> bool:
        """Whether there is too much besides the entries and ``held_bytes`` that are accounted for. Said once: the next
        look takes what it finds as the new normal, since freed memory does not all return to the system."""
        beyond = self._private_bytes() - num_entries * _ENTRY_BYTES - held_bytes
        if self._base_bytes is None:
            self._base_bytes = beyond
        heavy = beyond > self._base_bytes + UNEXPLAINED_BYTES_MAX
        if heavy:
            self._base_bytes = None
        return heavy

    def close(self) -> None:
        """After the last look."""
        if self._statm is not None:
            os.close(self._statm)
            self._statm = None

    def _private_bytes(self) -> int:
        """Resident memory that is not a file's: mapped records grow with use, and are no concern here."""
        if self._statm is None:
            self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        _, resident, shared, *_ = os.pread(self._statm, _STATM_BYTES_MAX, 0).split()
        return (int(resident) - int(shared)) * self._page_bytes
