"""A client of the core for an event loop: many requests at once, each with its deadline, answers in any order."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
import zmq
import zmq.asyncio

from lmcache.errors import PeerRefused, PeerSilent
from lmcache.wire import codec
from lmcache.wire.messages import FRAME_BYTES_MAX, Refused, Reply, Request
from lmcache.wire.peer import IN_FLIGHT_MAX


class AsyncClient:
    """Make, use and close it in one running loop. ``id`` of a request is ignored, as in ``peer.Client``."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),
            (zmq.SNDHWM, IN_FLIGHT_MAX),
            (zmq.RCVHWM, IN_FLIGHT_MAX),
            (zmq.MAXMSGSIZE, FRAME_BYTES_MAX),
        ):
            self._socket.setsockopt(option, value)
        self._socket.connect(endpoint)
        self._last_id = 0
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._reader = asyncio.create_task(self._read())

    async def call(self, request: Request, timeout_s: float) -> Reply:
        """Send and wait for the reply.

        Raises:
            PeerSilent: no reply within ``timeout_s`` seconds, or too many requests wait for one.
            PeerRefused: the core said no.
        """
        if len(self._waiting) >= IN_FLIGHT_MAX:
            raise PeerSilent(f"{IN_FLIGHT_MAX} requests are unanswered")
        self._last_id += 1
        number = self._last_id
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            async with asyncio.timeout(timeout_s):
                await self._socket.send(codec.encode(msgspec.structs.replace(request, id=number)))
                reply = await future
        except TimeoutError:
            raise PeerSilent(f"no answer within {timeout_s:g} s") from None
        except zmq.ZMQError as error:
            raise PeerSilent(f"cannot send: {error.strerror}") from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, Refused):
            raise PeerRefused(reply.code, reply.message)
        return reply

    async def close(self) -> None:
        """End the conversation; whoever still waits is told that nothing comes."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(PeerSilent("the conversation was ended"))
                future.exception()  # seen: who is still sending will not look at it
        self._socket.close(0)
        self._context.term()

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                reply = codec.decode_reply(frames[0])
            except codec.MalformedFrame:
                continue
            future = self._waiting.get(reply.id)
            if len(frames) == 1 and future is not None and not future.done():
                future.set_result(reply)
