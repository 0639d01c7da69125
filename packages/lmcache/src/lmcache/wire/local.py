"""The core's end of the conversations on this machine: one unix stream socket for each process, served in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lmcache.wire import codec
from lmcache.wire.messages import IN_FLIGHT_MAX, Reply
from lmcache.wire.peer import Peer, Received
from lmcache.wire.poller import Poller
from lmcache.wire.stream import Stream
from lmcache.wire.unix_listener import UnixListener

CONNECTIONS_MAX = 4096
"""Connections at once: four for each process that may be attached."""

ACCEPTED_MAX = 64
"""Connections that are let in at once: a crowd at the door must not fill its queue, or others are turned away there."""

HELD_BYTES_MAX = 256 << 20
"""What all connections together may leave here: beginnings of frames, and answers that nobody reads. Beyond it, the one
that has left most is ended."""


class LocalPeer:
    """One connection."""

    def __init__(self, stream: Stream, listener: LocalListener) -> None:
        self.stream = stream
        self.fd = stream.fileno()
        self.held_bytes = 0  # as the listener counted it
        self.is_queued = False
        self._listener = listener

    def send(self, reply: Reply) -> bool:
        """Answer without waiting, see ``Peer``."""
        return self._listener.send(self, reply)


class LocalListener:
    """Listens at a path, and serves who connects there one message at a time, all in turn.

    Who does not read its answers is not heard until it does: what it asks stays in its own socket.
    """

    def __init__(self, listener: UnixListener, poller: Poller) -> None:
        """Both are the caller's to close; ``poller`` reports to ``attend``."""
        self._listener = listener
        self._poller = poller
        self._peers: dict[int, LocalPeer] = {}
        self._turns: deque[LocalPeer] = deque()  # who has something to be taken
        self._held_bytes = 0
        poller.watch(listener.fileno())

    def __len__(self) -> int:
        return len(self._peers)

    @property
    def held_bytes(self) -> int:
        """What all connections have left here."""
        return self._held_bytes

    @property
    def has_waiting(self) -> bool:
        """Whether ``receive`` has something."""
        return bool(self._turns)

    def attend(self, fd: int) -> bool:
        """Do what a ready descriptor is ready for; False: it is not one of these connections."""
        peer = self._peers.get(fd)
        if peer is not None:
            self._hear(peer)
        elif fd == self._listener.fileno():
            self._accept()
        else:
            return False
        return True

    def receive(self) -> Received | None:
        """The next message, of whoever's turn it is; None when nobody has one. Never waits."""
        while self._turns:
            peer = self._turns.popleft()
            peer.is_queued = False
            stream = peer.stream
            if stream.has_unsent:
                continue
            if stream.frames:
                frame = stream.take()
                if stream.frames or stream.is_at_end:
                    self._queue(peer)
                self._weigh(peer)
                return Received(peer, frame, None)
            if stream.is_at_end and self._drop(peer) and stream.fault is not None:
                return Received(peer, None, None)
        return None

    def last_words(self, peer: Peer | None) -> Iterator[Received]:
        """All that has arrived of one connection, ahead of its turn, and however little of its answers it reads: as
        much as may be unanswered by the rules."""
        if not isinstance(peer, LocalPeer) or self._peers.get(peer.fd) is not peer:
            return
        for _ in range(IN_FLIGHT_MAX):
            if not peer.stream.frames:
                self._read(peer.stream)
            if not peer.stream.frames:
                break
            yield Received(peer, peer.stream.take(), None)
        self._weigh(peer)

    def send(self, peer: LocalPeer, reply: Reply) -> bool:
        """Answer without waiting; False, and the connection has ended, when it does not read. A process that is gone
        misses nothing, and what it said before is still heard."""
        if self._peers.get(peer.fd) is not peer:
            return False
        stream = peer.stream
        had_unsent = stream.has_unsent
        if not stream.send(codec.encode(reply)) and not stream.is_gone:
            self._drop(peer)
            return False
        if stream.has_unsent != had_unsent:
            self._poller.turn_to(peer.fd, writable=stream.has_unsent)
            if had_unsent and (stream.frames or stream.is_at_end):
                self._queue(peer)
        return self._weigh(peer)

    def _accept(self) -> None:
        for _ in range(ACCEPTED_MAX):
            connection = self._listener.accept()
            if connection is None:
                return
            if len(self._peers) >= CONNECTIONS_MAX:
                connection.close()
                continue
            peer = LocalPeer(Stream(connection), self)
            self._peers[peer.fd] = peer
            self._poller.watch(peer.fd)

    def _hear(self, peer: LocalPeer) -> None:
        stream = peer.stream
        if stream.has_unsent:
            if not stream.flush():
                self._weigh(peer)
                return
            self._poller.turn_to(peer.fd, writable=False)
        elif not stream.frames:
            self._read(stream)
        if self._weigh(peer) and (stream.frames or stream.is_at_end):
            self._queue(peer)

    @staticmethod
    def _read(stream: Stream) -> None:
        """Read until there is a frame, or nothing more."""
        while not stream.frames and not stream.is_at_end and stream.read():
            pass

    def _queue(self, peer: LocalPeer) -> None:
        if not peer.is_queued:
            peer.is_queued = True
            self._turns.append(peer)

    def _weigh(self, peer: LocalPeer) -> bool:
        """Count what a connection leaves here; False: it was too much, and this one has ended."""
        held_bytes = peer.stream.held_bytes
        if held_bytes != peer.held_bytes:
            self._held_bytes += held_bytes - peer.held_bytes
            peer.held_bytes = held_bytes
            if self._held_bytes > HELD_BYTES_MAX:
                greediest = max(self._peers.values(), key=lambda other: other.held_bytes)
                self._drop(greediest)
                return greediest is not peer
        return True

    def _drop(self, peer: LocalPeer) -> bool:
        """End a connection; False: it has ended before."""
        if self._peers.get(peer.fd) is not peer:
            return False
        del self._peers[peer.fd]
        self._poller.forget(peer.fd)
        peer.stream.close()
        self._held_bytes -= peer.held_bytes
        peer.held_bytes = 0
        return True

    def close(self) -> None:
        """End all connections; answers not yet sent are dropped."""
        for peer in list(self._peers.values()):
            self._drop(peer)
