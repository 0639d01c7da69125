"""Where chunks come from: tenant, namespace and layout, 40 bytes that very many chunks share, each kept once."""

from __future__ import annotations

from array import array

from lmcache.keys import NAMESPACE_PREFIX_BYTES, TENANT_BYTES

LAYOUT_BYTES = 8
ORIGIN_BYTES = TENANT_BYTES + NAMESPACE_PREFIX_BYTES + LAYOUT_BYTES
NAMESPACE = slice(TENANT_BYTES, TENANT_BYTES + NAMESPACE_PREFIX_BYTES)
UNKNOWN = bytes(ORIGIN_BYTES)
NOBODY = b"\xff" * ORIGIN_BYTES
"""Of an extent that a chunk of a tier will be read into: whose it is, is known when its header has been read."""


class Origins:
    """Numbers for origins; number 0 is ``UNKNOWN``. A number is free again when as many slots gave it as took it."""

    def __init__(self) -> None:
        self._origins = [UNKNOWN]
        self._numbers = {UNKNOWN: 0}
        self._users = array("I", [0])
        self._free: list[int] = []

    def take(self, origin: bytes, num_slots: int = 1) -> int:
        """The number of an origin, for so many more slots."""
        number = self._numbers.get(origin)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._origins[number] = origin
            else:
                number = len(self._origins)
                self._origins.append(origin)
                self._users.append(0)
            self._numbers[origin] = number
        self._users[number] += num_slots
        return number

    def give(self, number: int) -> None:
        """One slot less has this number."""
        self._users[number] -= 1
        if number and not self._users[number]:
            del self._numbers[self._origins[number]]
            self._origins[number] = b""
            self._free.append(number)

    def of(self, number: int) -> bytes:
        """The origin behind a number."""
        return self._origins[number]

    def tenant(self, number: int) -> bytes:
        """The tenant of the origin behind a number."""
        return self._origins[number][:TENANT_BYTES]
