"""How an object is sealed: AES-256-GCM over its checksums and extents, bound to its identity. All of this blocks.

Each object has a key and a nonce of its own, made by HMAC-SHA-512 from the configured key and 32 fresh random bytes,
the salt. So no count of objects wears a key out: for two objects to share a nonce, two salts have to be equal, which is
to be expected after 2**128 objects; random nonces under one AES-GCM key would allow 2**32. Associated data is the
header's fixed part (key of the chunk, tenant, namespace, layout, lengths, ranks, id of the key) and the salt. One tag
is over all of it, so extents cannot be exchanged either, neither within an object nor between two.

Python's lock is not held while bytes are worked on; that needs ``cryptography`` 50.
"""

from __future__ import annotations

import hmac
import secrets
import struct
import threading
from collections.abc import Sequence
from dataclasses import replace

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import GCM

from lmcache.tiers import objects
from lmcache.tiers.objects import Header, Seal
from lmcache.tiers.sealed_keys import Key

SALT_BYTES, TAG_BYTES = 32, 16
NONCE_BYTES = 12
OBJECT_BYTES_MAX = (1 << 36) - 32
"""What GCM allows under one nonce."""

PIECE_BYTES = 1 << 20
SCRATCH_BYTES = 128 << 10  # small enough to stay in a core's cache

_LABEL = b"lmcache seal 1\0"
_local = threading.local()


def seal(key: Key, header: Header, extents: Sequence[memoryview], target: memoryview) -> None:
    """Write an object's sealed form to ``target``, which is as long as the object and apart from the extents."""
    sealed = replace(header, seal=Seal(key.id, secrets.token_bytes(SALT_BYTES), bytes(TAG_BYTES)))
    assert sealed.seal is not None
    cipher, nonce = _for_object(key, sealed.seal)
    encryptor = Cipher(cipher, GCM(nonce)).encryptor()
    encryptor.authenticate_additional_data(_associated(sealed))
    form = f"<{len(header.checksums)}Q"
    checksums = struct.unpack(form, encryptor.update(struct.pack(form, *header.checksums)))
    start = objects.header_bytes(len(checksums))
    for extent in extents:
        for at in range(0, len(extent), PIECE_BYTES):
            piece = extent[at : at + PIECE_BYTES]
            encryptor.update_into(piece, target[start : start + len(piece)])
            start += len(piece)
    encryptor.finalize()
    sealed = replace(sealed, checksums=checksums, seal=replace(sealed.seal, tag=encryptor.tag))
    target[: objects.header_bytes(len(checksums))] = objects.encode(sealed)


def unseal(key: Key, header: Header, extents: Sequence[memoryview]) -> Header | None:
    """Decrypt extents where they lie; the plain header, or None where anything is not as it was sealed.

    After a None the extents hold bytes that nobody may use.
    """
    assert header.seal is not None
    cipher, nonce = _for_object(key, header.seal)
    decryptor = Cipher(cipher, GCM(nonce, header.seal.tag)).decryptor()
    decryptor.authenticate_additional_data(_associated(header))
    form = f"<{len(header.checksums)}Q"
    checksums = struct.unpack(form, decryptor.update(struct.pack(form, *header.checksums)))
    scratch = _scratch()  # the library does not say that source and target may be the same
    for extent in extents:
        for at in range(0, len(extent), SCRATCH_BYTES):
            piece = extent[at : at + SCRATCH_BYTES]
            source = scratch[: len(piece)]
            source[:] = piece
            decryptor.update_into(source, piece)
    try:
        decryptor.finalize()
    except InvalidTag:
        return None
    return replace(header, checksums=checksums, seal=None)


def _for_object(key: Key, seal: Seal) -> tuple[AES, bytes]:
    made = hmac.digest(key.secret, _LABEL + seal.salt, "sha512")
    return AES(made[:32]), made[32 : 32 + NONCE_BYTES]


def _associated(header: Header) -> bytes:
    assert header.seal is not None
    return objects.fixed_part(header) + header.seal.salt


def _scratch() -> memoryview:
    """A piece of memory for each thread."""
    found: memoryview | None = getattr(_local, "scratch", None)
    if found is None:
        found = _local.scratch = memoryview(bytearray(SCRATCH_BYTES))
    return found
