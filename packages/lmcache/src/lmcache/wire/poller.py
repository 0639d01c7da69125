"""Waiting for many things in one place: zmq's sockets and file descriptors."""

from __future__ import annotations

import errno
import math
import select

import zmq


class Poller:
    """One wait for a few zmq sockets and up to thousands of descriptors.

    Descriptors sit in an epoll set of their own, of which zmq sees one descriptor: a wait costs the same with one
    attached process as with a thousand.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._poller = zmq.Poller()
        self._poller.register(self._epoll.fileno(), zmq.POLLIN)

    def watch_socket(self, socket: zmq.Socket[bytes]) -> None:
        """Report ``socket`` when it has a message."""
        self._poller.register(socket, zmq.POLLIN)

    def forget_socket(self, socket: zmq.Socket[bytes]) -> None:
        """Stop watching ``socket``."""
        self._poller.unregister(socket)

    def watch(self, fd: int) -> None:
        """Report ``fd`` when it is readable or its other end is gone."""
        self._epoll.register(fd, select.EPOLLIN)

    def turn_to(self, fd: int, *, writable: bool) -> None:
        """From now on report ``fd``, which is watched, when it can be written to instead of read from; or back."""
        self._epoll.modify(fd, select.EPOLLOUT if writable else select.EPOLLIN)

    def forget(self, fd: int) -> None:
        """Stop watching ``fd``, which may be unknown already; call before closing it."""
        try:
            self._epoll.unregister(fd)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBADF):
                raise

    def wait(self, timeout_s: float | None) -> tuple[list[zmq.Socket[bytes]], list[int]]:
        """Wait at most ``timeout_s`` seconds (None: without end); returns what is ready: sockets, descriptors."""
        # Rounded up, so that a deadline has passed when the wait for it ends.
        timeout_ms = None if timeout_s is None else max(0, math.ceil(timeout_s * 1000))
        sockets: list[zmq.Socket[bytes]] = []
        fds: list[int] = []
        for ready, _ in self._poller.poll(timeout_ms):
            if isinstance(ready, zmq.Socket):
                sockets.append(ready)
            else:
                fds.extend(fd for fd, _ in self._epoll.poll(0))
        return sockets, fds

    def close(self) -> None:
        """Free the epoll set."""
        self._epoll.close()
