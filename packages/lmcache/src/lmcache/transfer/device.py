"""Copies of KV that lies on a GPU: the twin of ``CopyEngine``, whose work is enqueued on streams of its own.

Nothing here waits for the engine's streams, nor they for us. A *mark* is taken on the engine's own thread when a job is
ordered: the copy begins once the device has got that far, so a store reads what the forward before it wrote, and a load
writes no block that an earlier forward still reads. A job is over when the device says so, and the engine is told of it
only then.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from lmcache.errors import LayoutError
from lmcache.layout import Layout
from lmcache.transfer import _native
from lmcache.transfer.plan import CopyEngine, Mark, Plan
from lmcache.transfer.pool_map import PoolMap

if TYPE_CHECKING:
    import torch

STAGING_BYTES = 64 << 20
"""Device memory of the staging ring: all that a worker takes of the GPU's memory, beside some tables."""

PLANS_MAX = 8
"""Plans under way at once, of both directions."""

THREAD_BLOCKS_MAX = 16
"""Thread blocks of one copy, so that the engine's kernels keep the rest of the GPU. Not measured so far: tests/gpu does
where a GPU is."""

_DEPTH = 2  # parts of one job under way: one is moved while the one before it is awaited
_PAUSE_S = 50e-6


class Streams(Protocol):
    """A device's queues of work, as far as copies need them."""

    def make(self) -> int:
        """A stream of our own, as CUDA's handle."""

    def mark(self) -> Mark:
        """What the calling thread has enqueued for the engine so far."""

    def follow(self, stream: int, mark: Mark) -> None:
        """Let what is enqueued on ``stream`` from now on begin after ``mark``."""

    def pause(self) -> None:
        """Leave the device some time."""


class TorchStreams:
    """Streams of a GPU that torch drives."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[int, torch.cuda.Stream] = {}

    def make(self) -> int:
        """A stream of our own."""
        import torch

        stream = torch.cuda.Stream(self._device)
        handle = int(stream.cuda_stream)
        self._made[handle] = stream
        return handle

    def mark(self) -> Mark:
        """An event on the stream that the calling thread works on."""
        import torch

        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        mark: Mark = event
        return mark

    def follow(self, stream: int, mark: Mark) -> None:
        """Wait for the event, on the device."""
        self._made[stream].wait_event(mark)

    def pause(self) -> None:
        """Sleep."""
        time.sleep(_PAUSE_S)


def make_engine(layout: Layout, device: torch.device) -> CopyEngine:
    """The copy engine for KV on ``device``.

    Raises:
        LayoutError: this build cannot reach it.
    """
    if device.type == "cpu":
        return CopyEngine(layout)
    if device.type != "cuda" or not _native.HAS_CUDA:
        raise LayoutError(
            f"the KV is on {device}, and this build of lmcache copies memory of the host"
            + (" only: install it where nvcc is" if device.type == "cuda" else " and of NVIDIA's GPUs only")
        )
    return DeviceEngine(layout, device.index or 0, TorchStreams(device))


class DeviceEngine(CopyEngine):
    """Runs plans between one GPU's blocks and a pool. Thread-safe; each call waits for its own copy alone."""

    def __init__(self, layout: Layout, device: int, streams: Streams) -> None:
        super().__init__(layout)
        self._device = device
        self._streams = streams
        self._store_stream, self._load_stream = streams.make(), streams.make()
        self._lock = threading.Lock()
        self._copier: tuple[PoolMap, int, _native.DeviceCopier] | None = None

    def mark(self) -> Mark:
        """What a copy that is ordered now has to follow. To be called on the engine's own thread."""
        return self._streams.mark()

    def prepare(self, pool: PoolMap, ready_bytes: int, chunk_tokens: int) -> bool:
        """Make one more piece of the pool known to the device; True while there is more below ``ready_bytes``.

        Extents in pieces that are not known yet are copied through pinned memory.
        """
        start = pool.populated_bytes
        has_more = super().prepare(pool, ready_bytes, chunk_tokens)
        if pool.populated_bytes > start:
            self._copier_of(pool, chunk_tokens).register(start, pool.populated_bytes - start)
        return has_more

    def store(self, pool: PoolMap, plan: Plan, threads: int) -> bytes:
        """Engine blocks -> extents; returns the checksum (uint64) of each extent."""
        del threads  # of the host
        copier, stream = self._copier_of(pool, plan.chunk_tokens), self._store_stream

        def submit(part: Plan, start: int) -> int:
            del start
            return copier.store(part.blocks, part.offsets, part.seeds, stream)

        return self._run(copier, plan, stream, submit)

    def retrieve(self, pool: PoolMap, plan: Plan, checksums: Sequence[int], threads: int) -> list[int]:
        """Extents -> engine blocks; returns the indices of the chunks whose bytes were not what was stored."""
        del threads
        copier, stream = self._copier_of(pool, plan.chunk_tokens), self._load_stream

        def submit(part: Plan, start: int) -> int:
            expected = array("Q", checksums[start : start + len(part.offsets)])
            return copier.retrieve(part.blocks, part.offsets, part.seeds, expected, stream)

        verified = array("Q", self._run(copier, plan, stream, submit))
        return [index for index, good in enumerate(verified) if not good]

    def _run(self, copier: _native.DeviceCopier, plan: Plan, stream: int, submit: Callable[[Plan, int], int]) -> bytes:
        """Have a plan carried out, part after part; the results (uint64 a chunk) of all."""
        self._streams.follow(stream, plan.after)
        results = bytearray()
        under_way: deque[int] = deque()
        try:
            for part, start in _parts(plan, copier.chunks_max):
                while len(under_way) >= _DEPTH:
                    results += self._await(copier, under_way.popleft())
                while True:
                    try:
                        under_way.append(submit(part, start))
                        break
                    except _native.Busy:  # the other direction's; it ends by itself
                        if under_way:
                            results += self._await(copier, under_way.popleft())
                        else:
                            self._streams.pause()
        finally:
            # Also after a failure: blocks and extents belong to others only when the device has left them.
            while under_way:
                results += self._await(copier, under_way.popleft())
        return bytes(results)

    def _await(self, copier: _native.DeviceCopier, ticket: int) -> bytes:
        while (result := copier.finish(ticket)) is None:
            self._streams.pause()
        return result

    def _copier_of(self, pool: PoolMap, chunk_tokens: int) -> _native.DeviceCopier:
        """The native copier of a pool: made anew when the server is another one."""
        with self._lock:
            if self._copier is None or self._copier[0] is not pool or self._copier[1] != chunk_tokens:
                made = _native.DeviceCopier(
                    pool.buffer,
                    self.layout.plane_table(),
                    self.layout.group_table(chunk_tokens),
                    device=self._device,
                    staging_bytes=STAGING_BYTES,
                    plans_max=PLANS_MAX,
                    thread_blocks_max=THREAD_BLOCKS_MAX,
                )
                self._copier = (pool, chunk_tokens, made)
            return self._copier[2]


def _parts(plan: Plan, chunks_max: int) -> Iterator[tuple[Plan, int]]:
    """A plan in parts of at most ``chunks_max`` chunks, each with the number of its first one."""
    num_chunks = len(plan.offsets)
    width = len(plan.blocks) // num_chunks if num_chunks else 0
    for start in range(0, num_chunks, chunks_max):
        stop = min(start + chunks_max, num_chunks)
        blocks = plan.blocks[start * width : stop * width]
        yield Plan(plan.chunk_tokens, blocks, plan.offsets[start:stop], plan.seeds[start:stop], plan.after), start
