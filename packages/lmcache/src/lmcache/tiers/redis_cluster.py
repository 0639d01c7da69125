"""Which server of a Redis cluster holds a key, and following the servers' own word when that changes."""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from lmcache.errors import TierError
from lmcache.tiers.redis_link import Address, Link, Refusal, Reply, named
from lmcache.tiers.redis_pool import Pool, Settings

SLOTS = 16384
REDIRECTS = ("MOVED", "ASK")
REDIRECTS_MAX = 5

T = TypeVar("T")
Work = Callable[[Link], Awaitable[T | Refusal]]


def slot(name: bytes) -> int:
    """The slot of a key: CRC-16 of it, or of what stands between its first braces."""
    start = name.find(b"{")
    end = name.find(b"}", start + 1) if start >= 0 else -1
    if end > start + 1:
        name = name[start + 1 : end]
    return binascii.crc_hqx(name, 0) % SLOTS


def check(reply: Reply, address: Address) -> Reply:
    """The reply, unless it is an error.

    Raises:
        TierError: with the server's words.
    """
    if isinstance(reply, Refusal):
        if reply.code == "NOAUTH":
            raise TierError(f"{named(address)} wants a password: give password_env or password_file")
        raise TierError(f"{named(address)} refused: {reply.sentence}")
    return reply


class Servers:
    """Runs work at the server that holds a key. Without a cluster that is always the same one."""

    def __init__(self, pool: Pool, settings: Settings, cluster: bool) -> None:
        self._pool, self._seeds, self._cluster = pool, settings.addresses, cluster
        self._lock = asyncio.Lock()
        self._owners: list[Address | None] = [None] * SLOTS
        self._all: list[Address] = []
        self._silent: set[Address] = set()  # asked last
        self.stale = cluster

    def address(self, name: bytes) -> Address:
        """Where a key is, as far as known; never waits."""
        if not self._cluster:
            return self._seeds[0]
        return self._owners[slot(name)] or self._seeds[0]

    def all(self) -> list[Address]:
        """Every server that holds keys."""
        if not self._cluster:
            return [self._seeds[0]]
        return self._all

    def grouped(self, names: Sequence[bytes]) -> dict[Address, list[int]]:
        """Indices of the keys at each server."""
        groups: dict[Address, list[int]] = {}
        for index, name in enumerate(names):
            groups.setdefault(self.address(name), []).append(index)
        return groups

    async def at(self, address: Address, deadline: float, work: Callable[[Link], Awaitable[T]]) -> T:
        """Work at one server; one that cannot be reached may have lost its slots to another."""
        try:
            return await self._pool.run(address, deadline, work)
        except TierError:
            self.stale = self._cluster
            raise

    async def on_key(self, name: bytes, deadline: float, work: Work[T]) -> T | Refusal:
        """Work at the server that holds a key, going where the servers point.

        Raises:
            TierError: that server failed, or the cluster does not know who holds the key.
        """
        if self.stale:
            await self.refresh(deadline)
        address, asking = self.address(name), False
        for _ in range(REDIRECTS_MAX):
            result = await self.at(address, deadline, _asking(work) if asking else work)
            if not isinstance(result, Refusal) or result.code not in REDIRECTS:
                return result
            if not self._cluster:
                raise TierError(f"{named(address)} belongs to a cluster: set the option 'cluster' to true")
            asking = result.code == "ASK"
            target = _target(result, address)
            if not asking:
                await self.refresh(deadline)
            address = target
        raise TierError(f"the cluster of {named(self._seeds[0])} sends a key from server to server")

    async def refresh(self, deadline: float) -> None:
        """Ask the cluster which server holds which slots; any that answers will do."""
        if not self._cluster:
            return
        failure = TierError("the cluster has no servers")
        async with self._lock:
            known = dict.fromkeys([*self.all(), *self._seeds])
            for address in sorted(known, key=self._silent.__contains__):
                # half of what is left, so that one that hangs does not use up the others' time
                limit = (asyncio.get_running_loop().time() + deadline) / 2
                try:
                    reply = await self._pool.run(address, limit, lambda link: link.ask(b"CLUSTER", b"SLOTS"))
                    self._owners = _owners(check(reply, address), address)
                    self._all = sorted({owner for owner in self._owners if owner is not None})
                except TierError as error:
                    failure = error
                    self._silent.add(address)
                else:
                    self._silent.discard(address)
                    self.stale = False
                    return
            raise failure


def _asking(work: Work[T]) -> Work[T]:
    """A slot on its way to another server is served there only to those who say that they were sent."""

    async def told(link: Link) -> T | Refusal:
        reply = await link.ask(b"ASKING")
        return reply if isinstance(reply, Refusal) else await work(link)

    return told


def _target(refusal: Refusal, asked: Address) -> Address:
    """The address in ``MOVED SLOT HOST:PORT``; an empty host is the one that was asked."""
    host, _, port = refusal.sentence.rpartition(" ")[2].rpartition(":")
    if not port.isdigit():
        raise TierError(f"{named(asked)} answered something that is not the Redis protocol")
    return host or asked[0], int(port)


def _owners(reply: Reply, asked: Address) -> list[Address | None]:
    """The reply of CLUSTER SLOTS: ranges, each with its servers, the primary first."""
    owners: list[Address | None] = [None] * SLOTS
    for row in reply if isinstance(reply, list) else []:
        match row:
            case [int(first), int(last), [bytes() | None as host, int(port), *_], *_] if 0 <= first <= last < SLOTS:
                name = host.decode("utf-8", "replace") if host else ""
                address = (asked[0] if name in ("", "?") else name, port)
                owners[first : last + 1] = [address] * (last + 1 - first)
            case _:
                raise TierError(f"{named(asked)} answered something that is not the Redis protocol")
    if not any(owners):
        raise TierError(f"{named(asked)} belongs to a cluster that serves no slots")
    return owners
