"""What all routes share: asking the core, reading a body within limits, answering in JSON."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from lmcache.errors import PeerRefused, PeerSilent
from lmcache.wire.messages import REFUSED_BUSY

BODY_BYTES_MAX = 64 << 10

BODIES_BYTES_MAX = 32 << 20
"""Bodies of large requests that are in hand at once; each costs several times its bytes while it is being read."""

T = TypeVar("T")


class Rejected(Exception):
    """The request cannot be carried out: the status and the one sentence of its answer.

    Attributes:
        word: key of the sentence in the answer; upstream's clients look for `error` under some paths.
    """

    def __init__(self, status: int, detail: str, word: str = "detail") -> None:
        super().__init__(detail)
        self.status = status
        self.word = word


async def ask(link_ask: Callable[[Any], Awaitable[Any]], request: object, kind: type[T], word: str = "detail") -> T:
    """The core's answer to ``request``, which must be a ``kind``.

    Raises:
        Rejected: 409 at a limit of the core, 503 without an answer, 502 for an answer to another question.
    """
    try:
        reply = await link_ask(request)
    except PeerRefused as error:
        if error.code == REFUSED_BUSY:
            raise Rejected(409, str(error), word) from None
        raise Rejected(503, f"refused by the core: {error}", word) from None
    except PeerSilent as error:
        raise Rejected(503, f"no answer from the core: {error}", word) from None
    if not isinstance(reply, kind):
        raise Rejected(502, "the core gave an answer to another question", word)
    return reply


class Bodies:
    """Large bodies that are in hand at once, until their requests are over: together they have a limit, too."""

    def __init__(self, bytes_max: int = BODIES_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._used_bytes = 0

    @contextlib.asynccontextmanager
    async def read(self, request: Request, bytes_max: int) -> AsyncIterator[bytes]:
        """As ``read_body``, and 503 where others fill the limit; the bytes count until the context ends."""
        counted = 0

        def count(num_bytes: int) -> None:
            nonlocal counted
            if self._used_bytes + num_bytes > self._bytes_max:
                raise Rejected(503, "too many large requests are in hand: ask again")
            counted += num_bytes
            self._used_bytes += num_bytes

        try:
            yield await read_body(request, bytes_max, count)
        finally:
            self._used_bytes -= counted


async def read_body(
    request: Request, bytes_max: int = BODY_BYTES_MAX, count: Callable[[int], None] = lambda _: None
) -> bytes:
    """The whole body; ``count`` is told of each part's bytes.

    Raises:
        Rejected: it is longer than ``bytes_max``, or its sender is gone (and will not see the answer).
    """
    body = bytearray()
    try:
        async for part in request.stream():
            count(len(part))
            body += part
            if len(body) > bytes_max:
                raise Rejected(413, f"a body has at most {bytes_max} bytes")
    except ClientDisconnect:
        raise Rejected(400, "the body ended early") from None
    return bytes(body)


def read_object(body: bytes, word: str = "detail") -> dict[str, Any]:
    """A body as a JSON object.

    Raises:
        Rejected: it is none.
    """
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise Rejected(400, "the body is not valid JSON", word) from None
    if not isinstance(document, dict):
        raise Rejected(400 if word == "error" else 422, "the body must be a JSON object", word)
    return document


def reply(value: object, status: int = 200) -> Response:
    """``value`` as JSON."""
    return Response(json.dumps(value), status, media_type="application/json")
