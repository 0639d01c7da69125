"""How long a client of HTTP is waited for, and what is done where too many let us wait at once."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_S = 30.0
"""From the connection, or the last answer, until the next request has come as a whole and its answer was taken."""

CONNECTIONS_MAX = 512
"""Beyond that the connection that has kept us waiting longest is ended for each new one."""

_open: dict[PatientProtocol, None] = {}
"""Connections of this process, the one that was answered longest ago first."""


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP, which waits without end for a head, a body and a reader."""

    _overdue: asyncio.TimerHandle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the loop."""
        super().connection_made(transport)
        _open[self] = None
        self._overdue = self.loop.call_later(REQUEST_S, transport.abort)
        if len(_open) > CONNECTIONS_MAX:
            slowest = next((other for other in _open if other.is_waiting), None)
            if slowest is not None:
                del _open[slowest]  # now: its end is announced later, and many may connect before that
                slowest.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        self._overdue.cancel()
        _open.pop(self, None)
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Called by the request in hand."""
        self._overdue.cancel()
        self._overdue = self.loop.call_later(REQUEST_S, self.transport.abort)
        if self in _open:
            _open[self] = _open.pop(self)
        super().on_response_complete()

    @property
    def is_waiting(self) -> bool:
        """Whether it is the client's turn."""
        cycle: Any = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body
