"""The service process's line to the core: an ordinary client of the wire, on a thread of its own."""

from __future__ import annotations

import asyncio
import json
import time
from concurrent.futures import ThreadPoolExecutor

from lmcache.errors import PeerRefused, PeerSilent, WireError
from lmcache.wire.client import Client
from lmcache.wire.messages import REFUSED_UNKNOWN, WIRE_VERSION, Hello, Reply, Report, Request, Snapshot

CALL_S = 0.7
"""How long the core may take for one answer."""

WAIT_S = 2.0
"""How long one HTTP request may wait for its turn and its answer together."""

FRESH_S = 1.0
"""How old a sign of life may be that still counts as health."""

_WAITING_MAX = 64


class CoreLink:
    """Asks the core and never waits for it longer than agreed.

    The client belongs to one thread, so all conversation happens on the only thread of ``_executor``; at most
    ``_WAITING_MAX`` requests wait for it.
    """

    def __init__(self, endpoint: str, token: bytes) -> None:
        self._endpoint = endpoint
        self._token = token
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="lmcache-link")
        self._client: Client | None = None
        self._is_bound = False
        self._num_waiting = 0
        self._probe: asyncio.Task[str | None] | None = None
        self._probed_at = -FRESH_S
        self._verdict: str | None = None

    async def ask(self, request: Request) -> Reply:
        """One request.

        Raises:
            PeerSilent: no answer in time, or too many requests wait already.
            PeerRefused: the core said no.
        """
        if self._num_waiting >= _WAITING_MAX:
            raise PeerSilent("too many requests wait for the core")
        self._num_waiting += 1
        try:
            future = asyncio.get_running_loop().run_in_executor(self._executor, self._call, request)
            return await asyncio.wait_for(future, WAIT_S)
        except TimeoutError:
            raise PeerSilent("the core does not answer") from None
        finally:
            self._num_waiting -= 1

    async def illness(self) -> str | None:
        """None when a real message went through the core within the last second and it knows of no fault of its own,
        else the reason for a person."""
        if self._probe is None and time.monotonic() - self._probed_at >= FRESH_S:
            self._probe = asyncio.create_task(self._look())
        return self._verdict if self._probe is None else await asyncio.shield(self._probe)

    async def _look(self) -> str | None:
        try:
            reply = await self.ask(Snapshot(0))
            self._verdict = json.loads(reply.document)["status"]["reason"] if isinstance(reply, Report) else "no report"
        except WireError as error:
            self._verdict = f"no answer from the core: {error}"
        finally:
            self._probed_at = time.monotonic()
            self._probe = None
        return self._verdict

    def _call(self, request: Request) -> Reply:
        if self._client is not None and self._client.is_over:
            self._client.close()
            self._client = None
        if self._client is None:
            self._client, self._is_bound = Client(self._endpoint), False
        is_repetition = False
        while True:
            try:
                if not self._is_bound:
                    self._client.call(Hello(0, version=WIRE_VERSION, token=self._token), CALL_S)
                    self._is_bound = True
                reply = self._client.call(request, CALL_S)
            except PeerRefused as error:
                # The core forgot the connection: say Hello again, once.
                self._is_bound = False
                if is_repetition or error.code != REFUSED_UNKNOWN:
                    raise
                is_repetition = True
                continue
            return reply

    def close(self) -> None:
        """End the conversation; waits for at most the call in hand."""
        if self._client is not None:
            self._executor.submit(self._client.close)
        self._executor.shutdown(cancel_futures=False)
