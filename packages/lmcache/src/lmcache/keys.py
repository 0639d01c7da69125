"""Identity: which bytes a chunk of tokens names.

A *namespace* is the SHA-256 of everything besides the tokens that must match, in two steps: that of an engine (model,
weights, dtype, layout, ranks), which the server is told when the engine registers, and that of a request, which adds
the chunk size, the tenant's salt and the adapter. So whoever knows the engine's can compute the keys of a plain prompt.
The *key* of a chunk is a link of a SHA-256 chain that starts at the request's namespace and takes in one chunk of
tokens after another, so equal keys mean equal namespace and equal tokens from the first to the last of the chunk:

    key[-1] = namespace of the request
    key[i]  = SHA-256(key[i-1] || tokens of chunk i as little-endian uint32 || extra[i])

``extra`` is what stands beside the tokens (image hashes, LoRA, prompt embeds) and is empty for plain text. Chaining by
a collision-resistant hash is vLLM's block hash; we make our own because ours does not depend on the engine's block
size.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Mapping, Sequence

KEY_BYTES = 32
TENANT_BYTES = 16
TENANT_SECRET_BYTES = 32
NAMESPACE_PREFIX_BYTES = 16
"""Leading bytes of a request's namespace that stand beside its chunks: for accounts and people, never for identity."""

Scalar = str | bytes | int | bool | float | None
Value = Scalar | tuple["Value", ...] | list["Value"]

_TOKEN_BYTES = 4
_U64 = (1 << 64) - 1


def encode_value(value: Value) -> bytes:
    """One value as bytes that no other value shares: a type letter, the length in bytes, the content.

    Raises:
        TypeError: for a type whose identity we would have to guess; the caller then bypasses the cache.
    """
    if isinstance(value, bool):
        kind, body = b"?", b"1" if value else b"0"
    elif value is None:
        kind, body = b"0", b""
    elif isinstance(value, int):
        kind, body = b"i", str(value).encode()
    elif isinstance(value, float):
        kind, body = b"f", value.hex().encode()
    elif isinstance(value, str):
        kind, body = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        kind, body = b"b", value
    elif isinstance(value, (tuple, list)):
        kind, body = b"(", b"".join(encode_value(item) for item in value)
    else:
        raise TypeError(f"no stable identity for a {type(value).__name__}")
    return kind + len(body).to_bytes(8, "little") + body


def namespace(fields: Mapping[str, Value]) -> bytes:
    """Digest of named fields (32 bytes), independent of their order."""
    digest = hashlib.sha256(b"lmcache namespace 1\0")
    for name in sorted(fields):
        digest.update(encode_value((name, fields[name])))
    return digest.digest()


def request_namespace(engine: bytes, salt: str, fields: Mapping[str, Value], chunk_tokens: int) -> bytes:
    """Digest that the chain of one request starts at.

    In two steps, so that who knows an engine's digest and a tenant's salt can compute keys, and nothing else of the
    engine has to travel.

    Args:
        engine: ``namespace`` of all that the requests of one engine share.
        salt: of the tenant; "" for none.
        fields: what else belongs to the request (an adapter); empty for plain text.
    """
    return namespace({**fields, "base": engine, "salt": salt, "chunk_tokens": chunk_tokens})


def tenant_id(salt: str, secret: bytes) -> bytes:
    """What stands for a tenant wherever its chunks are: BLAKE2b of the salt, keyed by the server's ``secret``, so that
    nobody who finds it in a tier can try which salt it is.

    All zeros for the empty salt.
    """
    if not salt:
        return bytes(TENANT_BYTES)
    return hashlib.blake2b(salt.encode(), digest_size=TENANT_BYTES, key=secret, person=b"lmcache tenant").digest()


def pack_tokens(tokens: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32.

    Raises:
        OverflowError: for an id below 0 or above 2**32 - 1.
    """
    packed = array("I", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def extend(parent: bytes, packed: bytes, chunk_tokens: int, extras: Sequence[bytes] = ()) -> list[bytes]:
    """Keys of the whole chunks in ``packed``, which continue the chain at ``parent``.

    Args:
        parent: key of the chunk before the first one here, or the namespace digest.
        packed: ``pack_tokens`` of the tokens; a rest shorter than a chunk is left out.
        extras: what stands beside the tokens, one item a chunk; missing ones are empty.
    """
    step = chunk_tokens * _TOKEN_BYTES
    keys: list[bytes] = []
    sha256 = hashlib.sha256
    view = memoryview(packed)
    for index in range(len(packed) // step):
        link = sha256(parent)
        link.update(view[index * step : (index + 1) * step])
        if index < len(extras) and extras[index]:
            link.update(extras[index])
        parent = link.digest()
        keys.append(parent)
    return keys


def checksum_seed(key: bytes, rank: int) -> int:
    """Seed (uint64) of the checksum of this key's bytes on this rank: bytes stored under another identity fail it."""
    return (int.from_bytes(key[:8], "little") + rank) & _U64
