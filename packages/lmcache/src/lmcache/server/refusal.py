"""How a request is turned down, and what all of them are checked for."""

from __future__ import annotations

import sys
from array import array

from lmcache.keys import KEY_BYTES
from lmcache.wire import messages as m

if sys.byteorder != "little":
    raise ImportError("lists on the wire are little-endian, and so must be this machine")


class Refusal(Exception):
    """A request that is not carried out; becomes the reply ``Refused``."""

    def __init__(self, code: str, message: str, retry_ms: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_ms = retry_ms


def demand(holds: bool, rule: str) -> None:
    """Raises Refusal unless the rule holds."""
    if not holds:
        raise Refusal(m.REFUSED_INVALID, rule)


def count_keys(keys: bytes) -> int:
    """How many keys there are; Refusal for none, too many or half a key."""
    num_keys, rest = divmod(len(keys), KEY_BYTES)
    demand(rest == 0, f"keys are {KEY_BYTES} bytes each")
    demand(0 < num_keys <= m.KEYS_MAX, f"a request names 1 to {m.KEYS_MAX} keys, not {num_keys}")
    return num_keys


def words(name: str, data: bytes, code: str) -> list[int]:
    """A list of integers of an ``array`` type code; Refusal where the length is no multiple."""
    values = array(code)
    demand(len(data) % values.itemsize == 0, f"{name} is a list of uint{values.itemsize * 8}")
    values.frombytes(data)
    return values.tolist()
