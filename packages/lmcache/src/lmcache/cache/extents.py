"""Which bytes of the pool are in use: slabs of one size class a piece.

The pool is cut into pieces of 64 MiB (the last one may be short). A piece serves extents of one size, from its front;
when its last extent is freed it serves no size any more and any class may have it. Every step is O(1).
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain, repeat
from operator import floordiv

from lmcache.cache.base import PAGE_BYTES, PIECE_BYTES, IntegrityError
from lmcache.errors import LayoutError

NO_SLOT = -1

_PLACES_MIN, _PLACES_EACH = 1 << 16, 32
"""How thinly spread extents may lie for a table of all places to be worth its memory."""


class Piece:
    """One piece. ``size`` 0: serves no class. ``slots``: record slot of each extent ever carved, NO_SLOT where free."""

    __slots__ = ("base", "free", "length", "place", "size", "slots", "used")

    def __init__(self, base: int, length: int) -> None:
        self.base = base
        self.length = length
        self.size = 0
        self.used = 0
        self.slots = array("i")
        self.free = array("H")  # positions below len(slots); at most 64 MiB / 4 KiB = 2**14 of them
        self.place = -1  # index in the list of its class's pieces with room


class Extents:
    """Allocator over the leading ``ready_bytes`` of a pool."""

    def __init__(self, total_bytes: int, piece_bytes: int = PIECE_BYTES) -> None:
        self.total_bytes = total_bytes
        self.piece_bytes = piece_bytes
        self.used_bytes = 0
        self._ready_bytes = 0
        self._room: dict[int, list[Piece]] = {}
        self._idle: list[Piece] = []  # pieces that served a class and serve none now
        self._pieces: list[Piece] = []  # all that were ever opened, front to back

    def size_class(self, extent_bytes: int) -> int:
        """Bytes that an extent of ``extent_bytes`` takes.

        Raises:
            LayoutError: this pool can never hold one.
        """
        size = -(-extent_bytes // PAGE_BYTES) * PAGE_BYTES
        if 0 < size <= min(self.piece_bytes, self.total_bytes):
            return size
        if extent_bytes <= 0:
            raise LayoutError(f"a chunk of {extent_bytes} bytes cannot be stored")
        if size > self.piece_bytes:
            raise LayoutError(
                f"one chunk of this model takes {extent_bytes} bytes on a rank, more than the {self.piece_bytes} that "
                "an extent may have: start the server with a smaller --chunk-size"
            )
        raise LayoutError(
            f"one chunk of this model takes {extent_bytes} bytes on a rank, more than the whole pool of "
            f"{self.total_bytes}: start the server with a larger --l1-size-gb or a smaller --chunk-size"
        )

    def set_ready(self, ready_bytes: int) -> None:
        """The pool has grown: so may the capacity of the piece at its frontier."""
        if ready_bytes == self._ready_bytes:
            return
        frontier = self._ready_bytes // self.piece_bytes
        self._ready_bytes = ready_bytes
        if frontier < len(self._pieces):
            self._offer(self._pieces[frontier])

    def capacity(self, piece: Piece, size: int) -> int:
        """Extents of ``size`` that the ready part of a piece has room for."""
        return max(0, min(piece.length, self._ready_bytes - piece.base)) // size

    def allocate(self, size: int, slot: int) -> int | None:
        """Offset of a free extent, now ``slot``'s; None when no piece has room."""
        room = self._room.get(size)
        piece = room[-1] if room else self._open(size)
        if piece is None:
            return None
        if piece.free:
            position = piece.free.pop()
            piece.slots[position] = slot
        else:
            position = len(piece.slots)
            piece.slots.append(slot)
        piece.used += 1
        self.used_bytes += size
        if not piece.free and len(piece.slots) >= self.capacity(piece, size):
            self._withdraw(piece)
        return piece.base + position * size

    def free(self, offset: int) -> None:
        """Give an extent back."""
        piece = self._pieces[offset // self.piece_bytes]
        position = (offset - piece.base) // piece.size
        piece.slots[position] = NO_SLOT
        piece.free.append(position)
        piece.used -= 1
        self.used_bytes -= piece.size
        if piece.used:
            if piece.place < 0:
                self._offer(piece)
            return
        self._withdraw(piece)
        piece.size = 0
        piece.slots = array("i")
        piece.free = array("H")
        self._idle.append(piece)

    def shortfall(self, size: int) -> int | None:
        """Bytes that the ready part lacks for one more extent of ``size``; None: growing cannot help."""
        ready, step = self._ready_bytes, self.piece_bytes
        for index in (ready // step, ready // step + 1):
            base = index * step
            length = min(step, self.total_bytes - base)
            if index >= len(self._pieces) or self._pieces[index].size == 0:
                end = size
            elif self._pieces[index].size == size:
                end = (len(self._pieces[index].slots) + 1) * size
            else:
                continue
            if end <= length:
                return base + end - ready
        return None

    def piece_at(self, offset: int) -> Piece:
        """The piece that an extent lies in."""
        return self._pieces[offset // self.piece_bytes]

    def place(self, offset: int, size: int, slot: int) -> bool:
        """Take one given extent; False where it overlaps another or does not fit its piece. End with ``placed``."""
        if offset + size > self._ready_bytes:
            return False
        piece = self._opened(offset // self.piece_bytes)
        position, rest = divmod(offset - piece.base, size)
        if rest or position >= self.capacity(piece, size) or (piece.used and piece.size != size):
            return False
        if not piece.used:
            piece.size, piece.slots = size, array("i")
        if position < len(piece.slots) and piece.slots[position] != NO_SLOT:
            return False
        missing = position + 1 - len(piece.slots)
        if missing > 0:
            piece.slots.extend(array("i", [NO_SLOT]) * missing)
        piece.slots[position] = slot
        piece.used += 1
        self.used_bytes += size
        return True

    def place_many(self, classes: Mapping[int, tuple[Sequence[int], Sequence[int]]]) -> set[int]:
        """Take given extents before any other was taken, whole pieces at a time; end with ``placed``.

        Args:
            classes: by size, the offsets of extents and the slots that they are for.

        Returns the slots whose extents were not taken: all of a piece in which some overlap, are of different sizes or
        do not fit. ``place`` them one by one, those first that are to win.
        """
        step = self.piece_bytes
        rows: dict[int, tuple[int, array[int]]] = {}  # by piece: size, and slot by position
        contested: set[int] = set()
        for size, (offsets, slots) in classes.items():
            of_class = self._rows(size, offsets, slots)
            if sum(len(row) - row.count(NO_SLOT) for row in of_class.values()) < len(slots):
                for index, num in Counter(offset // step for offset in offsets).items():
                    if index not in of_class or len(of_class[index]) - of_class[index].count(NO_SLOT) < num:
                        contested.add(index)
            contested.update(of_class.keys() & rows.keys())
            rows.update((index, (size, row)) for index, row in of_class.items())
        for index, (size, row) in rows.items():
            if index in contested:
                continue
            piece = self._opened(index)
            piece.size, piece.slots, piece.used = size, row, len(row) - row.count(NO_SLOT)
            self.used_bytes += piece.used * size
        if not contested:
            return set()
        pairs = chain.from_iterable(zip(offsets, slots, strict=True) for offsets, slots in classes.values())
        return {slot for offset, slot in pairs if offset // step in contested}

    def _rows(self, size: int, offsets: Sequence[int], slots: Sequence[int]) -> dict[int, array[int]]:
        """By piece, the slots of a class at their positions. Of extents in the same place, one slot is kept.

        Nothing at all where an extent lies askew or beyond, or where they are so few that a table is not worth it.
        """
        step = self.piece_bytes
        width = step // size  # positions in a piece
        if step % size == 0:
            places = list(map(floordiv, offsets, repeat(size)))
            bases_bytes = sum(places) * size
        else:
            if any(offset % step // size >= width for offset in offsets):
                return {}
            places = [offset // step * width + offset % step // size for offset in offsets]
            bases_bytes = sum(place // width * step + place % width * size for place in places)
        end = max(places, default=-1) + 1
        if bases_bytes != sum(offsets) or end > _PLACES_MIN + _PLACES_EACH * len(slots):
            return {}
        table = array("i", [NO_SLOT]) * end
        for place, slot in zip(places, slots, strict=True):
            table[place] = slot
        rows = {}
        for start in range(0, end, width):
            row = table[start : start + width]
            while row and row[-1] == NO_SLOT:
                row.pop()
            if row and start // width * step + len(row) * size <= self._ready_bytes:
                rows[start // width] = row
        return rows

    def unplace(self, offset: int) -> None:
        """Take a placement back."""
        piece = self._pieces[offset // self.piece_bytes]
        piece.slots[(offset - piece.base) // piece.size] = NO_SLOT
        piece.used -= 1
        self.used_bytes -= piece.size

    def placed(self) -> None:
        """All extents are placed: what lies between them is free."""
        for piece in self._pieces:
            if piece.used:
                if NO_SLOT in piece.slots:
                    free = [position for position, slot in enumerate(piece.slots) if slot == NO_SLOT]
                    piece.free = array("H", free)
                self._offer(piece)
            else:
                piece.size, piece.slots = 0, array("i")
                self._idle.append(piece)

    def check(self) -> dict[int, int]:
        """Offset of each extent in use -> its slot.

        Raises:
            IntegrityError: free + held is not the total, or a list is not what it should be.
        """
        held: dict[int, int] = {}
        for piece in self._pieces:
            taken = [position for position, slot in enumerate(piece.slots) if slot != NO_SLOT]
            held.update((piece.base + position * piece.size, piece.slots[position]) for position in taken)
            has_room = piece.size > 0 and (len(piece.free) > 0 or len(piece.slots) < self.capacity(piece, piece.size))
            listed = piece.place >= 0 and self._room[piece.size][piece.place] is piece
            if piece.used != len(taken) or len(piece.slots) != len(taken) + len(piece.free):
                raise IntegrityError(f"piece at {piece.base}: free + held is not what was carved")
            if len(set(piece.free)) != len(piece.free) or set(piece.free) & set(taken):
                raise IntegrityError(f"piece at {piece.base}: an extent is both free and held, or free twice")
            idle = piece.size == 0
            if has_room != listed or idle != (piece.used == 0) or idle != (piece in self._idle):
                raise IntegrityError(f"piece at {piece.base} is listed where it does not belong")
        in_use = sum(piece.used * piece.size for piece in self._pieces)
        if in_use != self.used_bytes or in_use > self._ready_bytes or self._ready_bytes > self.total_bytes:
            raise IntegrityError(f"{self.used_bytes} bytes count as used, {in_use} are, {self._ready_bytes} are ready")
        return held

    def _opened(self, index: int) -> Piece:
        """The piece of this number, which exists from now on, as do all before it."""
        while len(self._pieces) <= index:
            base = len(self._pieces) * self.piece_bytes
            self._pieces.append(Piece(base, min(self.piece_bytes, self.total_bytes - base)))
        return self._pieces[index]

    def _open(self, size: int) -> Piece | None:
        """A piece for a class that has no room: an idle one, else the next of the ready part."""
        for index in range(len(self._idle) - 1, -1, -1):  # at most the short and the frontier piece are passed over
            if self.capacity(self._idle[index], size):
                piece = self._idle.pop(index)
                break
        else:
            base = len(self._pieces) * self.piece_bytes
            piece = Piece(base, min(self.piece_bytes, self.total_bytes - base))
            if not self.capacity(piece, size):
                return None
            self._pieces.append(piece)
        piece.size = size
        self._offer(piece)
        return piece

    def _offer(self, piece: Piece) -> None:
        """List a piece as one with room, if it has some."""
        if piece.size and piece.place < 0 and (piece.free or len(piece.slots) < self.capacity(piece, piece.size)):
            room = self._room.setdefault(piece.size, [])
            piece.place = len(room)
            room.append(piece)

    def _withdraw(self, piece: Piece) -> None:
        if piece.place < 0:
            return
        room = self._room[piece.size]
        last = room.pop()
        if last is not piece:
            room[piece.place] = last
            last.place = piece.place
        piece.place = -1
        if not room:
            del self._room[piece.size]
