"""The connections of one Redis tier: made by redis-py in a thread, kept while they are good, one a call."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from lmcache.errors import TierError
from lmcache.tiers.redis_link import Address, Link, Lost, named

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Settings:
    """How to connect. ``path``: of a unix socket, in place of addresses."""

    addresses: tuple[Address, ...]
    path: str | None
    db: int
    username: str | None
    password: str | None
    tls: bool
    tls_check_hostname: bool
    cacert: str | None
    cert: str | None
    key: str | None
    timeout_s: float


def _connection(settings: Settings, address: Address, timeout_s: float) -> Any:
    """A connection of redis-py, logged in. Blocks.

    Raises:
        TierError: no connection, no trust, or no admission.
    """
    import redis

    wanted: dict[str, Any] = {
        "db": settings.db,
        "username": settings.username,
        "password": settings.password,
        "protocol": 2,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
    }
    connection: Any
    if settings.path is not None:
        connection = redis.UnixDomainSocketConnection(path=settings.path, **wanted)
    elif settings.tls:
        connection = redis.SSLConnection(
            host=address[0],
            port=address[1],
            ssl_ca_certs=settings.cacert,
            ssl_certfile=settings.cert,
            ssl_keyfile=settings.key,
            ssl_check_hostname=settings.tls_check_hostname,
            **wanted,
        )
    else:
        connection = redis.Connection(host=address[0], port=address[1], **wanted)
    where = named(address)
    try:
        connection.connect()
        return connection
    except redis.AuthenticationError:
        connection.disconnect()
        who = f"the user {settings.username!r}" if settings.username else "the default user"
        raise TierError(f"{where} refused {who} with this password") from None
    except redis.TimeoutError:
        connection.disconnect()
        raise TierError(f"{where} did not answer in time") from None
    except Exception as error:
        # a server that speaks nonsense makes the library fail in any way it likes
        connection.disconnect()
        known = isinstance(error, (redis.ConnectionError, redis.ResponseError, OSError))
        reason = str(error).splitlines()[0][:200] if known and str(error) else "it does not speak the Redis protocol"
        raise TierError(f"{where} cannot be used: {reason}") from None


class Pool:
    """The connections of one tier, to all its servers; each call has one of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._idle: dict[Address, list[Link]] = {}
        self._busy: set[Link] = set()
        self._closed = False

    async def run(self, address: Address, deadline: float, work: Callable[[Link], Awaitable[T]]) -> T:
        """``work`` with a connection; once more on a new one if an idle one turns out to be dead."""
        idle = self._idle.get(address)
        if idle:
            try:
                return await self._work(idle.pop(), deadline, work)
            except Lost:
                for link in self._idle.pop(address, []):
                    link.close()
        left_s = deadline - asyncio.get_running_loop().time()
        if left_s <= 0 or self._closed:
            raise TierError(f"{named(address)} did not answer in time")
        connection = await asyncio.to_thread(_connection, self._settings, address, left_s)
        return await self._work(Link(connection, address), deadline, work)

    def close(self) -> None:
        """Disconnect all; calls that wait end with TierError."""
        self._closed = True
        for link in self._busy:
            link.end()
        for links in self._idle.values():
            for link in links:
                link.close()
        self._idle.clear()

    async def _work(self, link: Link, deadline: float, work: Callable[[Link], Awaitable[T]]) -> T:
        link.begin(deadline)
        self._busy.add(link)
        done = False
        try:
            if self._closed:
                link.end()
            result = await work(link)
            done = not link.spent and not self._closed
            return result
        finally:
            self._busy.discard(link)
            if done:
                self._idle.setdefault(link.address, []).append(link)
            else:
                link.close()
