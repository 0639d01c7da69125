"""The form of an object in every tier: a header that says all about it, then the extents of its ranks.

Header, little-endian, in whole pages: magic (8), version (u32), header bytes (u32), object bytes (u64), key (32),
tenant (16), namespace (16), layout (8), extent bytes (u64), ranks (u32), zeros (u32), a checksum (u64) for each rank,
then a CRC-32 (u32) of all before it; zeros up to the end of the page. The checksums are those that the engine made in
its store: of the first ``extent_bytes`` of each extent, seeded by key and rank. Extents lie on page boundaries.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from lmcache.keys import KEY_BYTES, NAMESPACE_PREFIX_BYTES, TENANT_BYTES

MAGIC = b"LMCOBJ\r\n"
VERSION = 1
PAGE_BYTES = 4096
LAYOUT_BYTES = 8
RANKS_MAX = 4096

_FIXED = struct.Struct(f"<8sIIQ{KEY_BYTES}s{TENANT_BYTES}s{NAMESPACE_PREFIX_BYTES}s{LAYOUT_BYTES}sQII")
_CHECKSUM_BYTES, _CRC_BYTES = 8, 4


class NoObject(ValueError):
    """Bytes that are no header of ours, or one that contradicts itself."""


@dataclass(frozen=True, slots=True)
class Header:
    """All that is known of an object besides its bytes."""

    key: bytes
    tenant: bytes
    namespace: bytes  # first 16 bytes of the request's namespace
    layout: bytes  # fingerprint of the engine's layout
    extent_bytes: int  # of each rank, as the engine asked
    checksums: tuple[int, ...]  # one a rank

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole object."""
        ranks = len(self.checksums)
        return header_bytes(ranks) + ranks * padded(self.extent_bytes)


def padded(num_bytes: int) -> int:
    """Rounded up to whole pages."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def header_bytes(ranks: int) -> int:
    """Bytes of the header of a chunk with so many ranks."""
    return padded(_FIXED.size + ranks * _CHECKSUM_BYTES + _CRC_BYTES)


def padded_extent_bytes(object_bytes: int, ranks: int) -> int | None:
    """Padded bytes of each extent of an object, from its length alone; None where no object can have that length."""
    each, rest = divmod(object_bytes - header_bytes(ranks), ranks)
    return each if each > 0 and rest == 0 and each % PAGE_BYTES == 0 else None


def encode(header: Header) -> bytes:
    """The header's pages."""
    ranks = len(header.checksums)
    size = header_bytes(ranks)
    body = _FIXED.pack(
        MAGIC,
        VERSION,
        size,
        header.num_bytes,
        header.key,
        header.tenant,
        header.namespace,
        header.layout,
        header.extent_bytes,
        ranks,
        0,
    ) + struct.pack(f"<{ranks}Q", *header.checksums)
    return (body + zlib.crc32(body).to_bytes(_CRC_BYTES, "little")).ljust(size, b"\0")


def decode(data: bytes | memoryview) -> Header:
    """Read a header from the first bytes of an object.

    Raises:
        NoObject: wrong magic, version, CRC, or a length that does not follow from the rest.
    """
    if len(data) < _FIXED.size:
        raise NoObject(f"{len(data)} bytes are too few for a header")
    magic, version, size, total, key, tenant, namespace, layout, extent_bytes, ranks, _ = _FIXED.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise NoObject("no object of this version")
    end = _FIXED.size + ranks * _CHECKSUM_BYTES
    if not 0 < ranks <= RANKS_MAX or size != header_bytes(ranks) or len(data) < end + _CRC_BYTES:
        raise NoObject("the header contradicts itself")
    if zlib.crc32(data[:end]) != int.from_bytes(data[end : end + _CRC_BYTES], "little"):
        raise NoObject("the header's CRC is wrong")
    header = Header(key, tenant, namespace, layout, extent_bytes, struct.unpack_from(f"<{ranks}Q", data, _FIXED.size))
    if not extent_bytes or header.num_bytes != total:
        raise NoObject("the header's lengths contradict each other")
    return header
