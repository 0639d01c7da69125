"""Is a peer on this machine?"""

from __future__ import annotations

import ipaddress
import time

_REFRESH_S = 1.0  # an address may move to another machine


class LocalAddresses:
    """This machine's own addresses. Loopback needs no look at the interfaces, so psutil is loaded for others only."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._read_at = -_REFRESH_S

    def __contains__(self, address: object) -> bool:
        try:
            peer = ipaddress.ip_address(str(address))
        except ValueError:
            return False
        if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped is not None:
            return str(peer.ipv4_mapped) in self
        return peer.is_loopback or str(peer) in self._interfaces()

    def _interfaces(self) -> set[str]:
        if time.monotonic() - self._read_at >= _REFRESH_S:
            import psutil

            # With their interface: another link may have a neighbour of the same link-local address.
            self._known = {item.address for items in psutil.net_if_addrs().values() for item in items}
            self._read_at = time.monotonic()
        return self._known


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens on ``host``, as far as its spelling tells."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
