"""Is a peer on this machine?"""

from __future__ import annotations

import ipaddress
import time

_REFRESH_S = 30.0


class LocalAddresses:
    """This machine's own addresses. Loopback needs no look at the interfaces, so psutil is loaded for others only."""

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._read_at = -_REFRESH_S

    def __contains__(self, address: object) -> bool:
        try:
            peer = ipaddress.ip_address(str(address).partition("%")[0])
        except ValueError:
            return False
        if isinstance(peer, ipaddress.IPv6Address) and peer.ipv4_mapped is not None:
            return str(peer.ipv4_mapped) in self
        return peer.is_loopback or str(peer) in self._interfaces()

    def _interfaces(self) -> set[str]:
        if time.monotonic() - self._read_at >= _REFRESH_S:
            import psutil

            found = (item.address for items in psutil.net_if_addrs().values() for item in items)
            self._known = {address.partition("%")[0] for address in found}
            self._read_at = time.monotonic()
        return self._known
