"""The faults of ``structural.py``, one kind a method."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable

import msgspec
from server_running import key
from structural_rig import EXTENT_BYTES, Rig, Used, contents, patch_file, uint64s

from lmcache.wire import messages as m

PROMPT_CHUNKS = 6
ON_THE_SIDE = 3  # prompts that others store meanwhile
ENDS = ("caught", "missed", "harmless", "wrong")

Names = list[object]


class Faults:
    """Makes one fault after another, each of a kind that the seed draws.

    ``counts``: by kind and by what became of it, one of ``ENDS``; ``wrong``: kind and chunk of wrong bytes that were
    used.
    """

    def __init__(self, rig: Rig, other: Rig, seed: int) -> None:
        self.rig = rig
        self.other = other
        self.random = random.Random(seed)
        self.counts: Counter[tuple[str, str]] = Counter()
        self.num_used = 0
        self.wrong: list[tuple[str, object]] = []
        self._serial = itertools.count()
        self._seed = seed
        self._stale = contents("stale")
        # kind -> how often, what it does to a prompt that is stored (or not yet) before it is used
        self.kinds: dict[str, tuple[float, Callable[[Names], None]]] = {
            "none": (4, self._none),
            "pool: swapped": (10, self._pool(self._swapped)),
            "pool: shifted": (10, self._pool(self._shifted)),
            "pool: stale": (10, self._pool(self._stale_bytes)),
            "pool: truncated": (10, self._pool(self._truncated)),
            "pool: zeroed": (10, self._pool(self._zeroed)),
            "pool: bit flipped": (10, self._pool(self._flipped)),
            "object: swapped": (0.6, self._object_swapped),
            "object: shifted": (0.6, self._object(lambda data: data[-64:] + data[:-64])),
            "object: stale": (0.6, self._object_stale),
            "object: truncated": (0.6, self._object(lambda data: data[: self.random.randrange(len(data))])),
            "object: zeroed": (0.6, self._object(lambda data: bytes(len(data)))),
            "object: bit flipped": (0.6, self._object(self._flip)),
            "object: deleted": (0.6, self._object_deleted),
            "answer: offsets swapped": (6, self._found(self._swap_offsets)),
            "answer: offset shifted": (6, self._found(self._shift_offset)),
            "answer: offset beyond the pool": (3, self._found(lambda found: self._offset(found, 1 << 50))),
            "answer: checksum changed": (6, self._found(self._change_checksum)),
            "answer: cut": (3, self._found(lambda found: self._replaced(found, offsets=found.offsets[:-8]))),
            "answer: too long": (3, self._found(lambda found: self._replaced(found, num_chunks=found.num_chunks + 1))),
            "answer: of another prompt": (6, self._found_of_another),
            "grant: offsets swapped": (6, self._granted),
            "commit: checksums swapped": (6, self._committed),
            "preempted: waiting": (5, self._preempted_waiting),
            "preempted: before the copy": (5, self._preempted("before_store")),
            "preempted: during the copy": (5, self._preempted_during),
            "preempted: after the copy": (5, self._preempted("after_store")),
            "preempted: stored": (5, self._preempted_stored),
            "aborted: asked": (5, self._aborted_asked),
            "aborted: answered": (5, self._aborted_answered),
            "aborted: loading": (5, self._aborted_loading),
            "lease lost: reused before the load": (2, self._reused),
            "line lost: before the copy, which is late": (0.6, self._line_lost("before_store")),
            "line lost: after the copy": (0.6, self._line_lost("after_store")),
        }

    def names(self) -> Names:
        """A new prompt."""
        serial = next(self._serial)
        return [(self._seed, serial, number) for number in range(self.random.randint(2, PROMPT_CHUNKS))]

    def one(self) -> None:
        """One fault, and the uses that follow."""
        names = self.names()
        weights = [weight for weight, _ in self.kinds.values()]
        kind = self.random.choices(list(self.kinds), weights)[0]
        self._current = kind
        self._used: list[Used] = []
        self._missed = False
        self.kinds[kind][1](names)
        if not self._used:
            self._use(names)
        self._use(names)  # what was quarantined is gone, what was right is right still
        if any(used.num_wrong for used in self._used):
            end = "wrong"
        elif any(used.num_failed for used in self._used):
            end = "caught"
        else:
            end = "missed" if self._missed else "harmless"
        self.counts[kind, end] += 1

    def _use(self, names: Names) -> None:
        prefix = self.rig.ask(names)
        if prefix is None or prefix.num_chunks < len(names):
            self._missed = True
        if prefix is not None:
            self._note(self.rig.load(names, prefix))

    def _note(self, used: Used) -> None:
        self._used.append(used)
        self.num_used += used.num_used
        self.wrong += [(self._current, name) for name in used.wrong]

    # --- what lies in the pool

    def _none(self, names: Names) -> None:
        self.rig.store(names)

    def _pool(self, damage: Callable[[list[int]], None]) -> Callable[[Names], None]:
        def fault(names: Names) -> None:
            self.rig.store(names)
            offsets = self.rig.offsets(names)
            if offsets:
                damage(offsets)

        return fault

    def _pick(self, offsets: list[int]) -> int:
        return self.random.choice(offsets)

    def _read(self, offset: int) -> bytes:
        return self.rig.pool[offset : offset + EXTENT_BYTES]

    def _write(self, offset: int, data: bytes) -> None:
        self._stale = self._read(offset)
        self.rig.pool[offset : offset + len(data)] = data

    def _swapped(self, offsets: list[int]) -> None:
        one, other = self.random.sample(offsets, 2)
        first, second = self._read(one), self._read(other)
        self._write(one, second)
        self._write(other, first)

    def _shifted(self, offsets: list[int]) -> None:
        offset, by = self._pick(offsets), self.random.choice([1, 2, 64, 1024, 4095])
        data = self._read(offset)
        self._write(offset, data[by:] + data[:by])

    def _stale_bytes(self, offsets: list[int]) -> None:
        self._write(self._pick(offsets), self._stale)

    def _truncated(self, offsets: list[int]) -> None:
        offset, length = self._pick(offsets), self.random.randrange(EXTENT_BYTES)
        self._write(offset, self._read(offset)[:length] + bytes(EXTENT_BYTES - length))

    def _zeroed(self, offsets: list[int]) -> None:
        self._write(self._pick(offsets), bytes(EXTENT_BYTES))

    def _flipped(self, offsets: list[int]) -> None:
        offset = self._pick(offsets)
        self._write(offset, self._flip(bytearray(self._read(offset))))

    def _flip(self, data: bytearray) -> bytes:
        bit = self.random.randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        return bytes(data)

    # --- what lies in the tier

    def _object(self, change: Callable[[bytearray], bytes | bytearray]) -> Callable[[Names], None]:
        def fault(names: Names) -> None:
            self.rig.store(names)
            if self.rig.in_tier(names) and (path := self.rig.object(self.random.choice(names))):
                patch_file(path, change)

        return fault

    def _object_swapped(self, names: Names) -> None:
        self.rig.store(names)
        if self.rig.in_tier(names):
            one, other = (self.rig.object(name) for name in self.random.sample(names, 2))
            if one and other:
                first, second = one.read_bytes(), other.read_bytes()
                patch_file(one, lambda _: second)
                patch_file(other, lambda _: first)

    def _object_stale(self, names: Names) -> None:
        """The object's own header, the extent of another one."""
        self.rig.store(names)
        if self.rig.in_tier(names) and (path := self.rig.object(self.random.choice(names))):
            stale = self._stale
            patch_file(path, lambda data: data[:-EXTENT_BYTES] + stale)

    def _object_deleted(self, names: Names) -> None:
        self.rig.store(names)
        if self.rig.in_tier(names) and (path := self.rig.object(self.random.choice(names))):
            path.unlink(missing_ok=True)

    # --- what the server says

    def _found(self, change: Callable[[m.Found], m.Found]) -> Callable[[Names], None]:
        def fault(names: Names) -> None:
            self.rig.store(names)
            self.rig.hooks.answer = change  # type: ignore[assignment]
            self._use(names)
            self.rig.hooks.answer = None

        return fault

    def _replaced(self, found: m.Found, **changes: object) -> m.Found:
        return msgspec.structs.replace(found, **changes)

    def _swap_offsets(self, found: m.Found) -> m.Found:
        offsets = uint64s(found.offsets)
        return self._replaced(found, offsets=offsets[::-1].tobytes())

    def _offset(self, found: m.Found, offset: int) -> m.Found:
        offsets = uint64s(found.offsets)
        if offsets:
            offsets[self.random.randrange(len(offsets))] = offset
        return self._replaced(found, offsets=offsets.tobytes())

    def _shift_offset(self, found: m.Found) -> m.Found:
        offsets = uint64s(found.offsets)
        by = self.random.choice([1, 64, EXTENT_BYTES])
        return self._offset(found, offsets[0] + by) if offsets else found

    def _change_checksum(self, found: m.Found) -> m.Found:
        checksums = uint64s(found.checksums)
        if checksums:
            checksums[self.random.randrange(len(checksums))] ^= 1 << self.random.randrange(64)
        return self._replaced(found, checksums=checksums.tobytes())

    def _found_of_another(self, names: Names) -> None:
        """An answer that belongs to another question, as from a server that mixes them up: all of it fits together."""
        others = [("of another", name) for name in names]
        self.rig.store(others)
        self.rig.store(names)
        prefix = self.rig.ask(others)
        if prefix is not None:
            self._note(self.rig.load(names, prefix))

    def _granted(self, names: Names) -> None:
        def swap(granted: m.Granted) -> m.Granted:
            return msgspec.structs.replace(granted, offsets=uint64s(granted.offsets)[::-1].tobytes())

        self.rig.hooks.answer = swap  # type: ignore[assignment]
        self.rig.store(names)
        self.rig.hooks.answer = None

    def _committed(self, names: Names) -> None:
        def swap(commit: m.Commit) -> m.Commit:
            return msgspec.structs.replace(commit, checksums=uint64s(commit.checksums)[::-1].tobytes())

        self.rig.hooks.request = swap  # type: ignore[assignment]
        self.rig.store(names)
        self.rig.hooks.request = None

    # --- preemption and abort, at every step

    def _take_blocks(self, job: int, names: Names) -> None:
        """The engine takes the blocks of a store away, and fills them with something else."""
        self.rig.copier.mark([job])
        self.rig.spoil_blocks(names)

    def _preempted(self, step: str) -> Callable[[Names], None]:
        def fault(names: Names) -> None:
            known = threading.Event()
            job = 0

            def take() -> None:
                known.wait()
                self._take_blocks(job, names)

            setattr(self.rig.hooks, step, take)
            job = self.rig.begin_store(names)
            known.set()
            self.rig.outcome(job)
            setattr(self.rig.hooks, step, None)

        return fault

    def _preempted_waiting(self, names: Names) -> None:
        others = [("ahead", name) for name in names]
        blocked = threading.Event()
        self.rig.hooks.before_store = lambda: blocked.wait() and None
        first = self.rig.begin_store(others)
        job = self.rig.begin_store(names)
        self._take_blocks(job, names)
        self.rig.copier.mark([first])  # it had the same blocks
        blocked.set()
        self.rig.outcome(first)
        self.rig.outcome(job)
        self.rig.hooks.before_store = None

    def _preempted_during(self, names: Names) -> None:
        """The blocks change at a moment that nobody knows."""
        job = self.rig.begin_store(names)
        until = time.perf_counter() + self.random.uniform(0.0, 0.003)
        while time.perf_counter() < until:
            pass
        if job in self.rig.ended:
            return
        self._take_blocks(job, names)
        self.rig.outcome(job)

    def _preempted_stored(self, names: Names) -> None:
        self.rig.store(names)
        self.rig.spoil_blocks(names)

    def _aborted_asked(self, names: Names) -> None:
        self.rig.store(names)
        question = self.rig.session.ask([key(name) for name in names])
        if question is not None:
            if self.random.random() < 0.5:
                self.rig.session.poll(question)
            self.rig.session.cancel(question)

    def _aborted_answered(self, names: Names) -> None:
        self.rig.store(names)
        prefix = self.rig.ask(names)
        if prefix is not None:
            self.rig.session.release(prefix)

    def _aborted_loading(self, names: Names) -> None:
        """The request ends while its load runs; its blocks are used again only once the load's outcome is there."""
        self.rig.store(names)
        prefix = self.rig.ask(names)
        if prefix is None:
            return
        self.rig.hooks.before_load = lambda: time.sleep(0.001)
        job = self.rig.begin_load(names, prefix)
        self.rig.session.release(prefix)
        self._on_the_side(1)
        self.rig.outcome(job)

    # --- extents that are somebody else's by now

    def _on_the_side(self, num_prompts: int) -> list[Names]:
        """Another engine stores meanwhile."""
        prompts = [[("other", *name) for name in self.names()] for _ in range(num_prompts)]  # type: ignore[misc]
        for names in prompts:
            self.other.store(names)
        return prompts

    def _check_others(self, prompts: list[Names]) -> None:
        for names in prompts:
            prefix = self.other.ask(names)
            if prefix is not None:
                used = self.other.load(names, prefix)
                self.num_used += used.num_used
                self.wrong += [(self._current, name) for name in used.wrong]

    def _reused(self, names: Names) -> None:
        """A lease ends behind the engine's back, its extents are given to others, then the load begins."""
        self.rig.store(names)
        prefix = self.rig.ask(names)
        if prefix is None:
            return
        self.rig.session.release(prefix)
        self.rig.server.ask("/cache/clear", b"")
        others = self._on_the_side(ON_THE_SIDE)
        self._note(self.rig.load(names, prefix))
        self._check_others(others)

    def _line_lost(self, step: str) -> Callable[[Names], None]:
        """The server gives an engine up while it stores; it goes on writing into what it had been granted."""

        def fault(names: Names) -> None:
            others: list[Names] = []

            def lose() -> None:
                line = self.rig.worker.line
                assert line is not None
                self.rig.worker.drop(line, "lost on purpose")
                self.rig.server.ask("/cache/clear", b"")
                others.extend(self._on_the_side(ON_THE_SIDE))

            setattr(self.rig.hooks, step, lose)
            self.rig.store(names)
            setattr(self.rig.hooks, step, None)
            self.rig.attached()
            self._check_others(others)

        return fault
