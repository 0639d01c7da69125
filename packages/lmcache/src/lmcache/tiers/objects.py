"""The form of an object in every tier: a header that says all about it, then the extents of its ranks.

Header, little-endian, in whole pages: magic (8), version (u32), header bytes (u32), object bytes (u64), key (32),
tenant (16), namespace (16), layout (8), extent bytes (u64), ranks (u32), zeros (u32), a checksum (u64) for each rank,
then a CRC-32 (u32) of all before it; zeros up to the end of the page. The checksums are those that the engine made in
its store: of the first ``extent_bytes`` of each extent, seeded by key and rank. Extents lie on page boundaries.

A sealed object has another version, the same length, and its checksums and extents encrypted (``sealed.py``). Where the
plain one has zeros it has the id of the key (4); behind the checksums come salt (32) and tag (16), then the CRC.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from lmcache.keys import KEY_BYTES, NAMESPACE_PREFIX_BYTES, TENANT_BYTES

MAGIC = b"LMCOBJ\r\n"
VERSION = 1
SEALED_VERSION = 2
PAGE_BYTES = 4096
LAYOUT_BYTES = 8
RANKS_MAX = 4096

_FIXED = struct.Struct(f"<8sIIQ{KEY_BYTES}s{TENANT_BYTES}s{NAMESPACE_PREFIX_BYTES}s{LAYOUT_BYTES}sQI4s")
_SEAL = struct.Struct("<32s16s")
_CHECKSUM_BYTES, _CRC_BYTES = 8, 4


class NoObject(ValueError):
    """Bytes that are no header of ours, or one that contradicts itself."""


@dataclass(frozen=True, slots=True)
class Seal:
    """What it takes, besides the key, to open a sealed object."""

    key_id: bytes  # 4 bytes
    salt: bytes  # 32 bytes, fresh for each object
    tag: bytes  # 16 bytes


@dataclass(frozen=True, slots=True)
class Header:
    """All that is known of an object besides its bytes."""

    key: bytes
    tenant: bytes
    namespace: bytes  # first 16 bytes of the request's namespace
    layout: bytes  # fingerprint of the engine's layout
    extent_bytes: int  # of each rank, as the engine asked
    checksums: tuple[int, ...]  # one a rank; of a sealed object they are encrypted
    seal: Seal | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole object."""
        ranks = len(self.checksums)
        return header_bytes(ranks) + ranks * padded(self.extent_bytes)


def padded(num_bytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def header_bytes(ranks: int) -> int:
    """Bytes of the header of a chunk with so many ranks, sealed or not."""
    return padded(_FIXED.size + ranks * _CHECKSUM_BYTES + _SEAL.size + _CRC_BYTES)


def padded_extent_bytes(object_bytes: int, ranks: int) -> int | None:
    """Padded bytes of each extent of an object, from its length alone; None where no object can have that length."""
    each, rest = divmod(object_bytes - header_bytes(ranks), ranks)
    return each if each > 0 and rest == 0 and each % PAGE_BYTES == 0 else None


def fixed_part(header: Header) -> bytes:
    """The header up to the checksums: all that stands in clear in a sealed object, its salt and tag apart."""
    return _FIXED.pack(
        MAGIC,
        VERSION if header.seal is None else SEALED_VERSION,
        header_bytes(len(header.checksums)),
        header.num_bytes,
        header.key,
        header.tenant,
        header.namespace,
        header.layout,
        header.extent_bytes,
        len(header.checksums),
        bytes(4) if header.seal is None else header.seal.key_id,
    )


def encode(header: Header) -> bytes:
    """The header's pages."""
    ranks, seal = len(header.checksums), header.seal
    body = fixed_part(header) + struct.pack(f"<{ranks}Q", *header.checksums)
    if seal is not None:
        body += _SEAL.pack(seal.salt, seal.tag)
    return (body + zlib.crc32(body).to_bytes(_CRC_BYTES, "little")).ljust(header_bytes(ranks), b"\0")


def decode(data: bytes | memoryview) -> Header:
    """Read a header from the first bytes of an object.

    Raises:
        NoObject: wrong magic, version, CRC, or a length that does not follow from the rest.
    """
    if len(data) < _FIXED.size:
        raise NoObject(f"{len(data)} bytes are too few for a header")
    magic, version, size, total, key, tenant, namespace, layout, extent_bytes, ranks, key_id = _FIXED.unpack_from(data)
    if magic != MAGIC or version not in (VERSION, SEALED_VERSION):
        raise NoObject("no object of this version")
    middle = _FIXED.size + ranks * _CHECKSUM_BYTES
    end = middle + (_SEAL.size if version == SEALED_VERSION else 0)
    if not 0 < ranks <= RANKS_MAX or size != header_bytes(ranks) or len(data) < end + _CRC_BYTES:
        raise NoObject("the header contradicts itself")
    if zlib.crc32(data[:end]) != int.from_bytes(data[end : end + _CRC_BYTES], "little"):
        raise NoObject("the header's CRC is wrong")
    checksums = struct.unpack_from(f"<{ranks}Q", data, _FIXED.size)
    seal = Seal(key_id, *_SEAL.unpack_from(data, middle)) if version == SEALED_VERSION else None
    header = Header(key, tenant, namespace, layout, extent_bytes, checksums, seal)
    if not extent_bytes or header.num_bytes != total:
        raise NoObject("the header's lengths contradict each other")
    return header
