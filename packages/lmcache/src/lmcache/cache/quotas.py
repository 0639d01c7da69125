"""How much of L1 each tenant takes, and which of its own entries go when it has reached its limit.

A tenant is 16 opaque bytes (``keys.tenant_id``). Bytes are counted for all tenants, by extent, from the moment that one
is granted. An order of its own has only a tenant with a limit: the others cost one array lookup at a touch, and nothing
at all while no tenant has a limit.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

from lmcache.cache.evict.base import Policy

_NO_ORDER = 0


class Quotas:
    """An eviction policy around another one: it passes all on, and keeps the books of tenants beside it."""

    def __init__(self, policy: Policy, tenant_of: Callable[[int], bytes]) -> None:
        """``tenant_of`` tells whose a visible entry is; it is asked when the entry is inserted, or a limit is set."""
        self.name = policy.name
        self._policy = policy
        self._tenant_of = tenant_of
        self._used: dict[bytes, int] = {}
        self._limits: dict[bytes, int] = {}
        self._numbers: dict[bytes, int] = {}  # of tenants with a limit, from 1 up
        self._orders: list[OrderedDict[int, None]] = [OrderedDict()]  # by number, least recently used first
        self._free_numbers: list[int] = []
        self._number_of = array("H")  # by entry

    # --- accounts

    def add(self, tenant: bytes, num_bytes: int) -> None:
        """So many bytes of extents are this tenant's from now on."""
        self._used[tenant] = self._used.get(tenant, 0) + num_bytes

    def subtract(self, tenant: bytes, num_bytes: int) -> None:
        """So many bytes of extents were this tenant's."""
        used = self._used[tenant] - num_bytes
        if used:
            self._used[tenant] = used
        else:
            del self._used[tenant]

    def used_bytes(self, tenant: bytes) -> int:
        """What a tenant takes now."""
        return self._used.get(tenant, 0)

    def tenant_bytes(self) -> dict[bytes, int]:
        """What each tenant takes that takes anything."""
        return dict(self._used)

    def is_over(self, tenant: bytes, num_bytes: int) -> bool:
        """Whether so many bytes more would take a tenant above its limit."""
        limit = self._limits.get(tenant)
        return limit is not None and self._used.get(tenant, 0) + num_bytes > limit

    def victims_of(self, tenant: bytes) -> Iterator[int]:
        """Visible entries of a tenant with a limit, in the order of going; nothing may be changed meanwhile."""
        return iter(self._orders[self._numbers[tenant]])

    # --- limits

    def limit_of(self, tenant: bytes) -> int | None:
        """The limit of a tenant in bytes; None where nothing limits it."""
        return self._limits.get(tenant)

    def set_limit(self, tenant: bytes, limit_bytes: int | None) -> None:
        """Limit a tenant, or do so no more (None). At most 65,535 tenants have a limit.

        Nothing goes at once: a tenant above its limit comes down to it with its next chunk. Its order is taken from the
        whole cache's, which costs a walk over all entries (0.3 us each) if it has any and had no limit before.
        """
        if limit_bytes is None:
            self._unlimit(tenant)
            return
        if tenant not in self._limits:
            self._build(tenant)
        self._limits[tenant] = limit_bytes

    def _build(self, tenant: bytes) -> None:
        if self._free_numbers:
            number = self._free_numbers.pop()
        else:
            number = len(self._orders)
            self._orders.append(OrderedDict())
        self._numbers[tenant] = number
        if tenant in self._used:
            tenant_of = self._tenant_of
            self._enter(number, [entry for entry in self._policy.victims() if tenant_of(entry) == tenant])

    def _unlimit(self, tenant: bytes) -> None:
        if self._limits.pop(tenant, None) is None:
            return
        number = self._numbers.pop(tenant)
        for entry in self._orders[number]:
            self._number_of[entry] = _NO_ORDER
        self._orders[number].clear()
        self._free_numbers.append(number)

    def _enter(self, number: int, entries: Sequence[int]) -> None:
        missing = max(entries, default=0) + 1 - len(self._number_of)
        if missing > 0:
            self._number_of.extend([_NO_ORDER] * missing)
        order = self._orders[number]
        for entry in entries:
            self._number_of[entry] = number
            order[entry] = None

    # --- the policy

    def insert(self, entries: Sequence[int]) -> None:
        """New entries, in the order of going."""
        self._policy.insert(entries)
        if self._limits:
            for entry in entries:
                number = self._numbers.get(self._tenant_of(entry), _NO_ORDER)
                if number != _NO_ORDER:
                    self._enter(number, (entry,))

    def touch(self, entries: Sequence[int]) -> None:
        """Entries that were asked for, in the order of going."""
        self._policy.touch(entries)
        if self._limits:
            numbers, end = self._number_of, len(self._number_of)
            for entry in entries:
                if entry < end and (number := numbers[entry]) != _NO_ORDER:
                    self._orders[number].move_to_end(entry)

    def remove(self, entry: int) -> None:
        """An entry is gone."""
        self._policy.remove(entry)
        if entry < len(self._number_of) and (number := self._number_of[entry]) != _NO_ORDER:
            del self._orders[number][entry]
            self._number_of[entry] = _NO_ORDER

    def victims(self) -> Iterator[int]:
        """Entries of all tenants in the order of going; nothing may be changed meanwhile."""
        return self._policy.victims()
