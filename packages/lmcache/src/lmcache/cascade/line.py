"""The cascade's conversation with the core, and its mapping of the pool."""

from __future__ import annotations

import asyncio
import os
from typing import TypeVar

from lmcache.errors import PeerRefused, PeerSilent, PoolError, WireError
from lmcache.transfer.pool_map import PoolMap
from lmcache.wire.async_client import AsyncClient, open_client
from lmcache.wire.attach import Attachment, attach
from lmcache.wire.messages import REFUSED_UNKNOWN, WIRE_VERSION, Attach, Done, Hello, Reply, Request, Welcome
from lmcache.wire.orders import Enlist

GREETING_S = 2.0
ANSWER_S = 5.0
"""The core answers within a millisecond; one that needs this long is stopped, and all we could do is wait."""

T = TypeVar("T")


class CoreLine:
    """One attachment. Made by ``open_line``."""

    def __init__(self, attachment: Attachment, pool: PoolMap, client: AsyncClient) -> None:
        self._attachment = attachment
        self._pool = pool
        self._client = client
        self._memory = memoryview(pool.buffer)
        self.is_lost = asyncio.Event()

    @property
    def pool_bytes(self) -> int:
        """Size of L1."""
        return self._pool.size_bytes

    def extent(self, offset: int, num_bytes: int) -> memoryview:
        """A piece of L1, where it lies."""
        return self._memory[offset : offset + num_bytes]

    def demand_whole(self) -> None:
        """Call before bytes of L1 are begun to be used, and before they are judged.

        Raises:
            PoolError: L1's file was cut under us: what was read from it or written to it since means nothing.
        """
        if not self._pool.is_whole:
            raise PoolError("the pool's file was cut while it was in use")

    async def ask(self, request: Request, kind: type[T], timeout_s: float = ANSWER_S) -> T:
        """One request, one answer.

        Raises:
            WireError: refused, no answer in time, or an answer to another question.
        """
        try:
            reply: Reply = await self._client.call(request, timeout_s)
        except PeerRefused as error:
            if error.code == REFUSED_UNKNOWN:  # the core no longer knows this connection
                self.is_lost.set()
            raise
        except PeerSilent:
            if self._client.is_over:
                self.is_lost.set()
            raise
        if not isinstance(reply, kind):
            raise WireError(f"the core answered a {type(request).__name__} with a {type(reply).__name__}")
        return reply

    async def close(self) -> None:
        """Detach; the core frees what this process held. The mapping lives as long as a tier still uses it."""
        await self._client.close()
        self._attachment.close()


async def open_line(attach_path: str, token: bytes, *, write_back: bool, read_only: bool) -> CoreLine:
    """Attach, and enlist as the core's cascade.

    Raises:
        LMCacheError: not now; one sentence.
    """
    request = Attach(version=WIRE_VERSION, pid=os.getpid(), name="cascade", want_pool=True)
    attachment = await asyncio.to_thread(attach, attach_path, request, GREETING_S)
    client: AsyncClient | None = None
    try:
        assert attachment.pool_fd is not None
        fd, attachment.pool_fd = attachment.pool_fd, None
        pool = PoolMap(fd, attachment.reply.pool_bytes)
        client = await open_client(attachment.reply.endpoint)
        line = CoreLine(attachment, pool, client)
        await line.ask(Hello(0, version=WIRE_VERSION, token=attachment.reply.token), Welcome, GREETING_S)
        await line.ask(Enlist(0, token=token, write_back=write_back, read_only=read_only), Done, GREETING_S)
        return line
    except BaseException:
        if client is not None:
            await client.close()
        attachment.close()
        raise
