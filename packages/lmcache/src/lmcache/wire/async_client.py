"""A client of the core for an event loop: many requests at once, each with its deadline, answers in any order."""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import open_unix_connection

import msgspec

from lmcache.errors import PeerRefused, PeerSilent
from lmcache.wire import codec
from lmcache.wire.client import LOCAL_SCHEME
from lmcache.wire.framing import LENGTH_BYTES
from lmcache.wire.messages import FRAME_BYTES_MAX, IN_FLIGHT_MAX, Refused, Reply, Request


class AsyncClient:
    """Made by ``open_client``; use and close it in one running loop. A request's ``id`` is ignored as in ``Client``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._reading = asyncio.create_task(self._read())

    @property
    def is_over(self) -> bool:
        """Whether the conversation has ended, from here or from there."""
        return self._reading.done()

    async def call(self, request: Request, timeout_s: float) -> Reply:
        """Send and wait for the reply.

        Raises:
            PeerSilent: no reply within ``timeout_s`` seconds, too many requests wait for one, or the conversation
                ended.
            PeerRefused: the core said no.
        """
        if self.is_over:
            raise PeerSilent("the conversation was ended")
        if len(self._waiting) >= IN_FLIGHT_MAX:
            raise PeerSilent(f"{IN_FLIGHT_MAX} requests are unanswered")
        self._last_id += 1
        number = self._last_id
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        frame = codec.encode(msgspec.structs.replace(request, id=number))
        try:
            async with asyncio.timeout(timeout_s):
                self._writer.write(len(frame).to_bytes(LENGTH_BYTES, "little") + frame)
                await self._writer.drain()
                reply = await future
        except TimeoutError:
            raise PeerSilent(f"no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise PeerSilent(f"cannot send: {error.strerror or error}") from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, Refused):
            raise PeerRefused(reply.code, reply.message)
        return reply

    async def close(self) -> None:
        """End the conversation; whoever still waits is told that nothing comes."""
        self._reading.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reading

    async def _read(self) -> None:
        try:
            while True:
                length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "little")
                if length > FRAME_BYTES_MAX:
                    return
                self._take(await self._reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            return  # the core's end is the end
        finally:
            self._writer.close()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(PeerSilent("the conversation was ended"))
                    future.exception()  # seen: who is still sending will not look at it

    def _take(self, frame: bytes) -> None:
        try:
            reply = codec.decode_reply(frame)
        except codec.MalformedFrame:
            return
        future = self._waiting.get(reply.id)
        if future is not None and not future.done():
            future.set_result(reply)


async def open_client(endpoint: str) -> AsyncClient:
    """Connect to a core of this machine ("unix:///a/path").

    Raises:
        PeerSilent: nobody listens there.
    """
    try:
        reader, writer = await open_unix_connection(endpoint.removeprefix(LOCAL_SCHEME))
    except OSError as error:
        raise PeerSilent(f"nobody answers at {endpoint}: {error.strerror or error}") from None
    return AsyncClient(reader, writer)
