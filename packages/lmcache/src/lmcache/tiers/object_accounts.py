"""What tenants with a limit hold in an object store: an empty marker beside each object, which all servers can list.

A marker is ``TENANTS/TENANT/TIME.KEY.BYTES``: the time of the put (nanoseconds, hex), so that a listing comes in the
order of the puts. It is written before its object and removed after it, so a death between counts too much, never too
little; so do objects that somebody else removed, until their turn comes as the tenant's oldest.

How exact it is. One server alone keeps a limit exactly. It learns of what others put by listing, at a tenant's first
put and then every ``REFRESH_S`` (less often where listing takes long): together they can be over a limit by what they
put in that time. What was put without a limit has no marker and is not counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

REFRESH_S = 30.0
LISTING_PART = 0.05  # of the time at most
VICTIMS_MAX = 1000  # removed for one put
TENANTS_MAX = 4096  # whose accounts are remembered
OBJECTS_MAX = 1 << 20  # of one tenant that we are ready to count


@dataclass(frozen=True, slots=True)
class Marker:
    """One counted object. ``name`` is the marker's path below the tenant's folder."""

    key: bytes
    num_bytes: int
    name: str


@dataclass(slots=True)
class _Account:
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    markers: dict[bytes, Marker] = field(default_factory=dict)  # in the order of the puts
    unwritten: set[bytes] = field(default_factory=set)  # keys whose marker is on its way: no listing shows it
    num_bytes: int = 0
    known_until: float = float("-inf")  # when it must be listed again, monotonic


def marker(key: bytes, num_bytes: int) -> Marker:
    """For an object put now."""
    return Marker(key, num_bytes, f"{time.time_ns():016x}.{key.hex()}.{num_bytes}")


def parse(name: str) -> Marker | None:
    """A marker from its name; None where it is none of ours."""
    stamp, _, rest = name.partition(".")
    digits, _, size = rest.partition(".")
    try:
        return Marker(bytes.fromhex(digits), int(size), name) if len(stamp) == 16 else None
    except ValueError:
        return None


class Accounts:
    """The accounts this server knows.

    Args:
        listing: names of a tenant's markers, in any order.
        remove: objects, then their markers, of one tenant.
    """

    def __init__(
        self,
        listing: Callable[[bytes], Awaitable[list[str]]],
        remove: Callable[[bytes, Sequence[Marker]], Awaitable[None]],
    ) -> None:
        self._listing, self._remove = listing, remove
        self._accounts: dict[bytes, _Account] = {}
        self.num_evicted = 0

    def tenant_bytes(self) -> dict[bytes, int]:
        """Of the tenants that put with a limit here."""
        return {tenant: account.num_bytes for tenant, account in self._accounts.items()}

    async def reserve(self, tenant: bytes, new: Marker, limit_bytes: int) -> Marker | bool | None:
        """Count an object that is about to be put, removing the tenant's oldest to make room.

        Returns:
            False where it cannot fit; else the marker that it had before, which the new one replaces, or None.
        """
        if new.num_bytes > limit_bytes:
            return False
        account = self._account(tenant)
        async with account.lock:
            if time.monotonic() > account.known_until and not await self._list(tenant, account):
                return False
            before = account.markers.get(new.key)
            self._put(account, new)
            account.unwritten.add(new.key)
            try:
                if await self._make_room(tenant, account, limit_bytes):
                    return before
            except BaseException:
                self._restore(account, new, before)
                raise
            self._restore(account, new, before)
            return False

    def settle(self, tenant: bytes, new: Marker, before: Marker | None, stored: bool) -> None:
        """The put that was reserved for is over; if it did not happen, what was before is what is there."""
        account = self._accounts.get(tenant)
        if account is None:
            return
        if stored:
            account.unwritten.discard(new.key)
        else:
            self._restore(account, new, before)

    def forget(self, key: bytes) -> dict[bytes, Marker]:
        """Count an object no more: its marker, by tenant, where we know of one."""
        found: dict[bytes, Marker] = {}
        for tenant, account in self._accounts.items():
            known = account.markers.get(key)
            if known is not None:
                self._drop(account, key)
                found[tenant] = known
        return found

    def _account(self, tenant: bytes) -> _Account:
        account = self._accounts.pop(tenant, None) or _Account()
        self._accounts[tenant] = account
        for old in list(self._accounts)[: max(0, len(self._accounts) - TENANTS_MAX)]:
            if not self._accounts[old].unwritten:
                del self._accounts[old]
        return account

    async def _make_room(self, tenant: bytes, account: _Account, limit_bytes: int) -> bool:
        victims: list[Marker] = []
        left = account.num_bytes
        for oldest in account.markers.values():
            if left <= limit_bytes or len(victims) == VICTIMS_MAX:
                break
            if oldest.key not in account.unwritten:
                victims.append(oldest)
                left -= oldest.num_bytes
        if victims:
            await self._remove(tenant, victims)
            for victim in victims:
                self._drop(account, victim.key)
            self.num_evicted += len(victims)
        return left <= limit_bytes  # else the rest is being put at this moment, or the next put removes more

    async def _list(self, tenant: bytes, account: _Account) -> bool:
        start = time.monotonic()
        names = await self._listing(tenant)
        if len(names) > OBJECTS_MAX:
            return False
        waiting = [account.markers[key] for key in account.unwritten]
        # an object that was put twice, by servers that did not know of each other, counts once
        listed = [found for found in map(parse, sorted(names)) if found is not None]
        account.markers, account.num_bytes = {}, 0
        for found in [*listed, *waiting]:
            self._put(account, found)
        now = time.monotonic()
        account.known_until = now + max(REFRESH_S, (now - start) / LISTING_PART)
        return True

    def _restore(self, account: _Account, new: Marker, before: Marker | None) -> None:
        self._drop(account, new.key)
        if before is not None:
            self._put(account, before)

    @staticmethod
    def _put(account: _Account, new: Marker) -> None:
        old = account.markers.pop(new.key, None)
        account.markers[new.key] = new
        account.num_bytes += new.num_bytes - (old.num_bytes if old else 0)

    @staticmethod
    def _drop(account: _Account, key: bytes) -> None:
        dropped = account.markers.pop(key, None)
        account.unwritten.discard(key)
        if dropped is not None:
            account.num_bytes -= dropped.num_bytes
