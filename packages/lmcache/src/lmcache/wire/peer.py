"""What the core sees of a connection, however it came: whom to answer, and one message of it."""

from __future__ import annotations

from typing import Protocol

import msgspec

from lmcache.wire.messages import Reply


class Peer(Protocol):
    """One connection. Hashable; equal to no other connection."""

    def send(self, reply: Reply) -> bool:
        """Answer without waiting; False when it cannot, and the connection speaks for nobody any more: it has too many
        answers waiting, or its other end is unknown."""


class Received(msgspec.Struct, frozen=True, gc=False):
    """One message. ``frame`` is None for what is no frame at all; ``address`` is an IP for tcp, None by path."""

    peer: Peer
    frame: bytes | None
    address: str | None
