"""The base of all messages."""

from __future__ import annotations

import msgspec


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all messages. ``id`` is chosen by the client and comes back in the reply."""

    id: int
