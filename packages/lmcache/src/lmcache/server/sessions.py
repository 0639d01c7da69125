"""Who is attached, and which connection speaks for whom. Ids and tokens are issued here and never used twice."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

from lmcache.system import Entropy
from lmcache.wire.door import VISITORS_MAX, Visitor
from lmcache.wire.messages import IN_FLIGHT_MAX, TOKEN_BYTES, Attach, Register
from lmcache.wire.peer import Peer

_NAME_MAX = 64


@dataclass(eq=False)
class Instance:
    """One attached process. ``id`` owns its leases and reservations; ``peer`` is the connection bound to it."""

    id: int
    token: bytes
    visitor: Visitor
    name: str
    pid: int  # by its own word: for people
    writer_slot: int | None = None  # what the pool knows it by, if it was given the pool
    peer: Peer | None = None
    registration: Register | None = None
    layout: bytes = b""  # fingerprint of what was registered
    granted: dict[int, int] = field(default_factory=dict)  # id of a lookup -> the lease or promotion of its answer

    def remember(self, question: int, granted: int) -> None:
        """Keep what a lookup was granted, for as long as its answer may be unread."""
        self.granted[question] = granted
        if len(self.granted) > IN_FLIGHT_MAX:
            del self.granted[next(iter(self.granted))]

    def __str__(self) -> str:
        return f"instance {self.id} ({self.name}, pid {self.pid})"


class Sessions:
    """All attached processes, the visitors who have not spoken yet, and the one connection of the service process."""

    def __init__(self, entropy: Entropy) -> None:
        self._entropy = entropy
        self._last_id = 0
        self._by_token: dict[bytes, Instance] = {}
        self._by_peer: dict[Peer, Instance] = {}
        self._by_fd: dict[int, Instance] = {}
        self._visitors: dict[int, Visitor] = {}
        self._service_token = b""
        self._service_peer: Peer | None = None

    def __len__(self) -> int:
        return len(self._by_fd)

    def instances(self) -> list[Instance]:
        """The attached processes, oldest first."""
        return list(self._by_fd.values())

    # --- at the door

    def full(self) -> bool:
        """Whether no further visitor fits."""
        return len(self._by_fd) + len(self._visitors) >= VISITORS_MAX

    def welcome(self, visitor: Visitor) -> None:
        """Remember a visitor until it has spoken."""
        self._visitors[visitor.socket.fileno()] = visitor

    def visitor(self, fd: int) -> Visitor | None:
        """The visitor behind a descriptor."""
        return self._visitors.get(fd)

    def show_out(self, visitor: Visitor) -> None:
        """Forget a visitor."""
        self._visitors.pop(visitor.socket.fileno(), None)

    @property
    def has_visitors(self) -> bool:
        """Whether somebody is at the door who has not spoken yet."""
        return bool(self._visitors)

    def overdue(self, now: float) -> list[Visitor]:
        """Visitors who should have spoken by now."""
        return [visitor for visitor in self._visitors.values() if visitor.deadline <= now]

    def next_deadline(self) -> float | None:
        """When the first visitor is overdue."""
        if not self._visitors:
            return None
        return min((visitor.deadline for visitor in self._visitors.values()), default=None)

    # --- attached

    def admit(self, visitor: Visitor, request: Attach, writer_slot: int | None) -> Instance:
        """Make a visitor an instance."""
        self.show_out(visitor)
        self._last_id += 1
        name = "".join(letter for letter in request.name if letter.isprintable())[:_NAME_MAX] or "unnamed"
        token = self._entropy.token(TOKEN_BYTES)
        instance = Instance(self._last_id, token, visitor, name, request.pid, writer_slot)
        self._by_token[token] = instance
        self._by_fd[visitor.socket.fileno()] = instance
        return instance

    def attached(self, fd: int) -> Instance | None:
        """The instance behind a descriptor."""
        return self._by_fd.get(fd)

    def drop(self, instance: Instance) -> None:
        """Forget an instance and its connection; its token opens nothing any more."""
        self._by_fd.pop(instance.visitor.socket.fileno(), None)
        self._by_token.pop(instance.token, None)
        self.unbind(instance)

    # --- connections

    def bind(self, peer: Peer, token: bytes) -> bool:
        """Let ``peer`` speak for the holder of ``token``, instead of any connection before; False: nobody's token."""
        if self._service_token and hmac.compare_digest(token, self._service_token):
            self._service_peer = peer
            return True
        instance = self._by_token.get(token)
        if instance is None:
            return False
        self.forget(peer)
        self.unbind(instance)
        instance.granted.clear()  # the next connection counts its requests anew
        instance.peer = peer
        self._by_peer[peer] = instance
        return True

    def speaker(self, peer: Peer) -> Instance | None:
        """Whom a connection speaks for."""
        return self._by_peer.get(peer)

    def unbind(self, instance: Instance) -> None:
        """No connection speaks for this instance any more, until the next Hello with its token."""
        if instance.peer is not None:
            self._by_peer.pop(instance.peer, None)
            instance.peer = None

    def forget(self, peer: Peer) -> None:
        """This connection speaks for nobody any more."""
        instance = self._by_peer.get(peer)
        if instance is not None:
            self.unbind(instance)
        if peer == self._service_peer:
            self._service_peer = None

    # --- the service process

    def expect_service(self, token: bytes) -> None:
        """The next service process will present ``token``; the one before it speaks no more."""
        self._service_token = token
        self._service_peer = None

    def is_service_token(self, token: bytes) -> bool:
        """Whether this is what the service process was told."""
        return bool(self._service_token) and hmac.compare_digest(token, self._service_token)

    def is_service(self, peer: Peer) -> bool:
        """Whether this connection is the service process's."""
        return peer == self._service_peer
