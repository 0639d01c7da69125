"""What the core keeps for the HTTP API alone: limits of tenants, and how the keys of each engine begin.

Both live as long as the core: a restart of the service process loses nothing. A restart of the server forgets which
engines it has met; limits are kept in a file.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass

from lmcache.keys import tenant_id

LIMITS_MAX = 1024
SALT_BYTES_MAX = 256
SALTS_BYTES_MAX = 256 << 10
"""Bytes of all salts with a limit, as JSON: everything that is kept here must fit into one frame."""

NAMESPACES_MAX = 64


@dataclass(frozen=True)
class Known:
    """An engine that registered at some time; ``namespace`` is the hex form of what its requests' keys start from."""

    model: str
    engine: str
    world_size: int
    namespace: str


class TooMany(Exception):
    """No further tenant fits."""


class Tenants:
    """Limits by salt, and namespaces in the order of their last registration."""

    def __init__(self, secret: bytes) -> None:
        """``secret`` is the key of ``keys.tenant_id``."""
        self._secret = secret
        self._limits_gb: dict[str, float] = {}
        self._salts_bytes = 0
        self._known: OrderedDict[Known, None] = OrderedDict()

    def id_of(self, salt: str) -> bytes:
        """What stands for a tenant in books, records and objects."""
        return tenant_id(salt, self._secret)

    def limit(self, salt: str, limit_gb: float | None) -> bool:
        """Set a limit, or remove it (None); returns whether there was one.

        Raises:
            TooMany: ``LIMITS_MAX`` tenants have one already, or their salts are too long together.
        """
        existed = salt in self._limits_gb
        salt_bytes = len(_encode(salt))
        if limit_gb is None:
            self._salts_bytes -= salt_bytes if existed else 0
            self._limits_gb.pop(salt, None)
            return existed
        if not existed:
            if len(self._limits_gb) >= LIMITS_MAX or self._salts_bytes + salt_bytes > SALTS_BYTES_MAX:
                raise TooMany(f"{len(self._limits_gb)} tenants have a limit, and no more fit: remove one first")
            self._salts_bytes += salt_bytes
        self._limits_gb[salt] = limit_gb
        return existed

    def meet(self, known: Known) -> None:
        """An engine registered; beyond ``NAMESPACES_MAX`` the one that is longest ago is forgotten."""
        self._known[known] = None
        self._known.move_to_end(known)
        if len(self._known) > NAMESPACES_MAX:
            self._known.popitem(last=False)

    def forget(self, namespace: str) -> None:
        """No engine is of this namespace any more, nor will be."""
        for known in [known for known in self._known if known.namespace == namespace]:
            del self._known[known]

    def document(self, used_bytes: Callable[[bytes], int], asked: str | None = None) -> bytes:
        """JSON: {"limits_gb": {salt: number}, "used_bytes": {salt: bytes of L1}, "ids": {salt: hex of ``id_of``},
        "known": [Known, newest first]}.

        Args:
            used_bytes: of a tenant, by ``keys.tenant_id``.
            asked: a salt whose bytes are told whether it has a limit or not.
        """
        salts = {*self._limits_gb, *(() if asked is None else (asked,))}
        ids = {salt: self.id_of(salt) for salt in salts}
        used = {salt: used_bytes(tenant) for salt, tenant in ids.items()}
        hexed = {salt: tenant.hex() for salt, tenant in ids.items()}
        known = [asdict(item) for item in reversed(self._known)]
        return _encode({"limits_gb": self._limits_gb, "used_bytes": used, "ids": hexed, "known": known})


def _encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
