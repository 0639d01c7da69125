"""The books that outlive the server: one record a slot, in a file that engines never see.

Header (one page), then records of 128 bytes, which no page boundary cuts. A record ends in a CRC over all before it,
so a record that was not written whole is no record. Writes are gathered and go out in runs with
``flush``, which every verb of the cache calls before it answers: an extent is granted only after the record that
claimed it before is gone, and a chunk is visible only after its record says so. Records say nothing of leases: who
reads an extent that is granted anew after a crash sees a wrong checksum, which is a miss.

A record's sequence is the order of eviction that the next server begins with. It is given at publication, and what was
asked for since then shows only after ``write_order``, at a clean stop: after a crash, the order is that of publication.
"""

from __future__ import annotations

import errno
import struct
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import compress
from typing import NamedTuple

from lmcache.cache.base import NO_WRITER, PAGE_BYTES
from lmcache.cache.origins import UNKNOWN
from lmcache.system import File

MAGIC = b"LMCL1REC"
VERSION = 2
RECORD_BYTES = 128
FREE, RESERVED, COMMITTED = range(3)

SLOT_POOL_BYTES = 64 << 10
SLOTS_MIN = 1024

_HEADER = struct.Struct("<8sI16sQQIQ?3x")
_VERSION = struct.Struct("<8sI")  # as the header of every version begins
_READY_OFFSETS = (PAGE_BYTES // 2, PAGE_BYTES // 2 + 64)
_READY = struct.Struct("<Q")
_CRC = struct.Struct("<I")
_BODY = struct.Struct("<32sQQQQIIHHI40s?3x")  # the fields of Record
_BODY_AND_CRC = struct.Struct("<124sI")
_KEY = struct.Struct("<32s96x")
_ORIGIN = struct.Struct("<80x40s8x")
_SEQUENCE = struct.Struct("<Q")
_SEQUENCE_AT, _CLEAN_AT, _CRC_AT = 48, 120, 124
_EMPTY = b"\0" * RECORD_BYTES
_STEP_SLOTS = 512


_WHOLE_PAGE = zlib.crc32((bytes(_CRC_AT) + _CRC.pack(zlib.crc32(bytes(_CRC_AT)))) * (PAGE_BYTES // RECORD_BYTES))


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
    origin: bytes  # tenant, namespace and layout, not interpreted here
    clean: bool  # the tiers below have it, so that nobody need write it to them


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

    def read_version(self) -> int | None:
        """The version that the header names, be it understood or not; None where there is no header of ours."""
        start = self.file.read(_VERSION.size, 0)
        magic, version = _VERSION.unpack(start.ljust(_VERSION.size, b"\0"))
        return int(version) if magic == MAGIC else None

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
        self,
        slot: int,
        key: bytes,
        rank: int,
        shape: tuple[int, int],
        offset: int,
        by: tuple[int, int],
        origin: bytes = UNKNOWN,
    ) -> None:
        """A writer is at this extent. ``shape``: world size, extent bytes; ``by``: owner, writer slot."""
        world_size, length = shape
        owner, writer = by
        record = Record(key, offset, 0, 0, owner, length, writer, world_size, rank, RESERVED, origin, False)
        self._pending[slot] = sealed(_BODY.pack(*record))

    def publish(
        self,
        slot: int,
        key: bytes,
        rank: int,
        shape: tuple[int, int],
        offset: int,
        checksum: int,
        origin: bytes = UNKNOWN,
        clean: bool = False,
    ) -> None:
        """This extent's bytes are written and have this checksum."""
        self.sequence += 1
        world_size, length = shape
        numbers = (offset, checksum, self.sequence, 0, length, NO_WRITER, world_size, rank, COMMITTED)
        self._pending[slot] = sealed(_BODY.pack(key, *numbers, origin, clean))

    def mark_clean(self, slots: Iterable[int]) -> None:
        """The tiers below have these published extents now."""
        for slot in slots:
            data = self._pending.get(slot) or self.file.read(RECORD_BYTES, PAGE_BYTES + slot * RECORD_BYTES)
            body = _unsealed(data)
            if body is not None:
                self._pending[slot] = sealed(body[:_CLEAN_AT] + b"\1" + body[_CLEAN_AT + 1 :])

    def write_order(self, slots: Iterable[int]) -> None:
        """Give published extents new sequences in this order, the first to be evicted first; about 1 us each.

        One write; killed in it, some records have the new sequence and some the old one, and all are whole.
        """
        self.flush()
        image = bytearray(self.image())
        view = memoryview(image)
        for slot in slots:
            start = slot * RECORD_BYTES
            body = view[start : start + _CRC_AT]
            if _CRC.unpack_from(image, start + _CRC_AT)[0] != zlib.crc32(body):  # never make a torn record whole
                continue
            self.sequence += 1
            _SEQUENCE.pack_into(image, start + _SEQUENCE_AT, self.sequence)
            _CRC.pack_into(image, start + _CRC_AT, zlib.crc32(body))
        if image:
            self.file.write(bytes(image), PAGE_BYTES)

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


class Columns:
    """An image by columns, each with an item a slot: what one pass over many records is quick on.

    ``slots`` are those with a whole record, a ``range`` where all have one; items of others mean nothing. ``part`` has
    few different items, of which ``part_of`` tells what they say.
    """

    def __init__(self, image: bytes, num_slots: int) -> None:
        used = memoryview(image)[: num_slots * RECORD_BYTES]
        words = used.cast("Q")
        step = RECORD_BYTES // words.itemsize
        whole = _whole(used)
        self.slots: Sequence[int] = range(num_slots) if all(whole) else list(compress(range(num_slots), whole))
        self.keys: list[bytes] = [key for (key,) in _KEY.iter_unpack(used)]
        numbers = _Numbers()
        self.origin = array("I", [numbers[origin] for (origin,) in _ORIGIN.iter_unpack(used)])
        self.origins: list[bytes] = list(numbers)  # by the items of ``origin``
        self.clean = used[_CLEAN_AT::RECORD_BYTES].tobytes()
        columns = (array("Q", words[at::step].tobytes()) for at in (4, 5, 6, 9))
        self.offset, self.checksum, self.sequence, self.part = columns
        halves = used.cast("I")
        self.length, self.writer = (array("I", halves[at :: 2 * step].tobytes()) for at in (16, 17))


class _Numbers(dict[bytes, int]):
    """Numbers for whatever is asked for, from 0 up."""

    def __missing__(self, name: bytes) -> int:
        number = self[name] = len(self)
        return number


def part_of(word: int) -> tuple[int, int, int]:
    """World size, rank and state, from an item of ``Columns.part``."""
    return word & 0xFFFF, word >> 16 & 0xFFFF, word >> 32


def _whole(used: memoryview) -> bytearray:
    """1 for each slot whose CRC is right.

    The CRC of a page full of records whose CRCs are right is always the same, because CRCs are linear; so most pages
    take one step. Damage slips through that with the same chance of 2**-32 as through the CRC of one record.
    """
    crc32 = zlib.crc32
    whole = bytearray(b"\1") * (len(used) // RECORD_BYTES)
    for start in range(0, len(used), PAGE_BYTES):
        page = used[start : start + PAGE_BYTES]
        if crc32(page) != _WHOLE_PAGE:
            first = start // RECORD_BYTES
            flags = bytes([crc32(body) == crc for body, crc in _BODY_AND_CRC.iter_unpack(page)])
            whole[first : first + len(flags)] = flags
    return whole
