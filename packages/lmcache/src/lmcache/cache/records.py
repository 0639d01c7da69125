"""The books that outlive the server: one record a slot, in a file that engines never see.

Header (one page), then records of 128 bytes, which no page boundary cuts. A record ends in its state and a CRC over
all before it, so a record that was not written whole is no record. Writes are gathered and go out in runs with
``flush``, which every verb of the cache calls before it answers: an extent is granted only after the record that
claimed it before is gone, and a chunk is visible only after its record says so. Records say nothing of leases: who
reads an extent that is granted anew after a crash sees a wrong checksum, which is a miss.
"""

from __future__ import annotations

import errno
import struct
import zlib
from dataclasses import astuple, dataclass
from typing import NamedTuple

from lmcache.cache.base import NO_WRITER, PAGE_BYTES
from lmcache.system import File

MAGIC = b"LMCL1REC"
VERSION = 1
RECORD_BYTES = 128
FREE, RESERVED, COMMITTED = range(3)

SLOT_POOL_BYTES = 64 << 10
SLOTS_MIN = 1024

_HEADER = struct.Struct("<8sI16sQQIQ?3x")
_READY_OFFSETS = (PAGE_BYTES // 2, PAGE_BYTES // 2 + 64)
_READY = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_BODY = struct.Struct("<32sQQQQIIHHI")  # key, offset, checksum, sequence, owner, length, writer, world, rank, state
_PADDING = b"\0" * (RECORD_BYTES - _BODY.size - _CRC.size)
_EMPTY = b"\0" * RECORD_BYTES
_STEP_SLOTS = 512


class Record(NamedTuple):
    """One extent as the file describes it."""

    key: bytes
    offset: int
    checksum: int
    sequence: int  # grows with every publication: the order of eviction after an adoption
    owner: int
    length: int  # bytes, as the engine asked
    writer: int  # slot of the process that writes a RESERVED extent
    world_size: int
    rank: int
    state: int


@dataclass(frozen=True, slots=True)
class Header:
    """What pool the records belong to."""

    boot_id: bytes
    pool_bytes: int
    piece_bytes: int
    chunk_tokens: int
    pool_inode: int
    persist: bool  # the server was asked to leave its pool behind


def slots_max(pool_bytes: int) -> int:
    """Extents that the records of a pool can describe: one for each 64 KiB. Unused ones cost nothing."""
    return max(SLOTS_MIN, pool_bytes // SLOT_POOL_BYTES)


def sealed(body: bytes) -> bytes:
    """Bytes with their CRC behind them."""
    return body + _CRC.pack(zlib.crc32(body))


def _unsealed(data: bytes) -> bytes | None:
    body = data[: -_CRC.size]
    return body if len(data) > _CRC.size and sealed(body) == data else None


class Records:
    """The open and locked records file."""

    def __init__(self, file: File) -> None:
        self.file = file
        self.sequence = 0
        self._pending: dict[int, bytes] = {}
        self._ready_turn = 0
        self._backed_slots = max(0, file.info().size_bytes - PAGE_BYTES) // RECORD_BYTES

    def write_header(self, header: Header) -> None:
        """Name the pool these records belong to."""
        values = astuple(header)
        self.file.write(sealed(_HEADER.pack(MAGIC, VERSION, *values)), 0)

    def read_header(self) -> Header | None:
        """The header, or None where there is none that we understand."""
        body = _unsealed(self.file.read(_HEADER.size + _CRC.size, 0))
        if body is None:
            return None
        magic, version, *values = _HEADER.unpack(body)
        return Header(*values) if (magic, version) == (MAGIC, VERSION) else None

    def write_ready(self, ready_bytes: int) -> None:
        """Note how far the pool's memory exists (called by the thread that grows it).

        In two places by turns: if this write is cut short, the other still tells of all memory that was ever granted.
        """
        self._ready_turn ^= 1
        self.file.write(sealed(_READY.pack(ready_bytes)), _READY_OFFSETS[self._ready_turn])

    def read_ready(self) -> int:
        """How far the pool's memory is known to exist."""
        ready = [0, 0]
        for turn, offset in enumerate(_READY_OFFSETS):
            body = _unsealed(self.file.read(_READY.size + _CRC.size, offset))
            ready[turn] = _READY.unpack(body)[0] if body else 0
        self._ready_turn = ready.index(max(ready))
        return max(ready)

    def back(self, slot: int) -> bool:
        """See to it that writing this slot's record cannot fail for want of memory; False when there is none."""
        while slot >= self._backed_slots:
            try:
                self.file.allocate(PAGE_BYTES + self._backed_slots * RECORD_BYTES, _STEP_SLOTS * RECORD_BYTES)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    return False
                raise
            self._backed_slots += _STEP_SLOTS
        return True

    def reserve(
        self, slot: int, key: bytes, rank: int, shape: tuple[int, int], offset: int, by: tuple[int, int]
    ) -> None:
        """A writer is at this extent. ``shape``: world size, extent bytes; ``by``: owner, writer slot."""
        world_size, length = shape
        owner, writer = by
        self._put(slot, Record(key, offset, 0, 0, owner, length, writer, world_size, rank, RESERVED))

    def publish(self, slot: int, key: bytes, rank: int, shape: tuple[int, int], offset: int, checksum: int) -> None:
        """This extent's bytes are written and have this checksum."""
        self.sequence += 1
        world_size, length = shape
        record = Record(key, offset, checksum, self.sequence, 0, length, NO_WRITER, world_size, rank, COMMITTED)
        self._put(slot, record)

    def clear(self, slot: int) -> None:
        """This slot describes nothing."""
        self._pending[slot] = _EMPTY

    def flush(self) -> None:
        """Write what was gathered, neighbouring slots together."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        start = end = min(pending)
        run: list[bytes] = []
        for slot in sorted(pending):
            if slot != end:
                self.file.write(b"".join(run), PAGE_BYTES + start * RECORD_BYTES)
                start, run = slot, []
            run.append(pending[slot])
            end = slot + 1
        self.file.write(b"".join(run), PAGE_BYTES + start * RECORD_BYTES)

    def image(self) -> bytes:
        """All records that the file has room for."""
        return self.file.read(max(0, self.file.info().size_bytes - PAGE_BYTES), PAGE_BYTES)

    def _put(self, slot: int, record: Record) -> None:
        body = _BODY.pack(*record) + _PADDING
        self._pending[slot] = body + _CRC.pack(zlib.crc32(body))


def parse(image: bytes, slot: int) -> Record | None:
    """The record of a slot in an image of the file; None where there is no whole one."""
    data = image[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES]
    if len(data) < RECORD_BYTES or data == _EMPTY:
        return None
    body = _unsealed(data)
    return Record(*_BODY.unpack_from(body)) if body else None


def is_clear(image: bytes, slot: int) -> bool:
    """Whether a slot's record was never written or was cleared."""
    return not any(image[slot * RECORD_BYTES : (slot + 1) * RECORD_BYTES])
