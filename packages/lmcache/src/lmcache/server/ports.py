"""Addresses to listen on: names resolved, ports taken, and one sentence where that fails."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from lmcache.errors import ConfigError, LMCacheError


class PortInUse(LMCacheError):
    """Somebody listens on the address already."""


def endpoint(host: str, port: int) -> str:
    """A zmq endpoint for a host name or address.

    Raises:
        ConfigError: the name means nothing here.
    """
    family, address = _lookup(host, port)
    return f"tcp://[{address}]:{port}" if family == socket.AF_INET6 else f"tcp://{address}:{port}"


def _lookup(host: str, port: int) -> tuple[socket.AddressFamily, str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"{host!r} is no address of this machine: {error.strerror}") from None
    # Version 4 first: "localhost" must mean what clients of 127.0.0.1 expect.
    family, _, _, _, address = min(found, key=lambda item: item[0] != socket.AF_INET)
    return family, str(address[0])


@contextlib.contextmanager
def listen(host: str, port: int) -> Iterator[socket.socket]:
    """The listening socket of HTTP, which outlives any service process."""
    family, address = _lookup(host, port)
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(512)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortInUse(f"port {port} is in use on {host}") from None
            raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from None
        yield listener
