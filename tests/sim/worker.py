"""One rank of a scripted engine: its memory, and the real copier of a worker process."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from lmcache.connectors.copier import CopyWorker, Outcome
from lmcache.connectors.link import Address, Link
from lmcache.keys import KEY_BYTES
from lmcache.transfer import _native
from lmcache.transfer.plan import Mark, Plan
from lmcache.wire.messages import KernelGroup, Register

from .kernel import Kernel, Process, Violation, check_alive
from .memory import PoolMap
from .oracle import Oracle, Written
from .strands import block

SERVER = Address("tcp://localhost", 5555)


@dataclass(frozen=True)
class Model:
    """What engines of one kind store. Chunks of two kinds never share a key."""

    name: str
    world_size: int
    extent_bytes: int


class Blocks:
    """The memory of one rank of an engine: one block a chunk."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.data = [bytearray(block_bytes) for _ in range(num_blocks)]
        self.free = list(range(num_blocks))


class Copies:
    """In place of ``transfer.plan.CopyEngine``: the same bytes, but others have their turn in the middle of a copy."""

    def __init__(self, kernel: Kernel, oracle: Oracle, blocks: Blocks, extent_bytes: int) -> None:
        self._kernel = kernel
        self._oracle = oracle
        self._blocks = blocks
        self._extent_bytes = extent_bytes

    def mark(self) -> Mark:
        """Nothing: memory is the host's."""
        return None

    def prepare(self, pool: PoolMap, ready_bytes: int, chunk_tokens: int) -> bool:
        """As the real one's."""
        del chunk_tokens
        return pool.populate(ready_bytes)

    def store(self, pool: PoolMap, plan: Plan, threads: int) -> bytes:
        """Blocks to extents, in halves."""
        del threads
        process = check_alive()
        checksums = array("Q")
        size = self._extent_bytes
        for block_id, offset, seed in zip(plan.blocks, plan.offsets, plan.seeds, strict=True):
            if offset + size > pool.size_bytes:
                raise Violation(f"an extent at {offset} reaches beyond the pool")
            source = self._blocks.data[block_id]
            self._oracle.begin_write(process, Written(pool.inode, offset, offset + size))
            try:
                half = size // 2
                _check_writer(process, pool, offset)
                first = bytes(source[:half])
                pool.buffer[offset : offset + half] = first
                self._pause()
                second = bytes(source[half:size])
                _check_writer(process, pool, offset)
                pool.buffer[offset + half : offset + size] = second
                checksums.append(_native.checksum(first + second, seed))
            finally:
                self._oracle.end_write(process)
            self._pause()
        return checksums.tobytes()

    def retrieve(self, pool: PoolMap, plan: Plan, checksums: Sequence[int], threads: int) -> list[int]:
        """Extents to blocks, in halves; the chunks whose bytes are not what was stored."""
        del threads
        check_alive()
        size, failed = self._extent_bytes, []
        for index, (block_id, offset, seed) in enumerate(zip(plan.blocks, plan.offsets, plan.seeds, strict=True)):
            target = self._blocks.data[block_id]
            half = size // 2
            target[:half] = pool.buffer[offset : offset + half]
            self._pause()
            target[half:size] = pool.buffer[offset + half : offset + size]
            if _native.checksum(target, seed) != checksums[index]:
                failed.append(index)
        return failed

    def _pause(self) -> None:
        if self._kernel.chance(0.4):
            delay_s = self._kernel.random.uniform(0.0001, 0.004)
            if self._kernel.chance(0.05):
                delay_s = self._kernel.random.uniform(0.5, 5.0)
            block(lambda: asyncio.sleep(delay_s))


def _check_writer(process: Process, pool: PoolMap, offset: int) -> None:
    if not PoolMap.files.may_write(pool.mapping, offset):
        raise Violation(f"{process.name} writes to an extent at {offset} that is not reserved for it")


class Worker:
    """One rank."""

    def __init__(self, kernel: Kernel, oracle: Oracle, name: str, model: Model, num_blocks: int, rank: int) -> None:
        self.process = Process(kernel, f"{name}.worker{rank}")
        self.blocks = Blocks(num_blocks, model.extent_bytes)
        self.outcomes: dict[int, Outcome] = {}
        self.process.enter()
        try:
            self.link = Link(SERVER, self.process.name, True, lambda _: registration(model, "worker", rank))
            copies = Copies(kernel, oracle, self.blocks, model.extent_bytes)
            self.copier = CopyWorker(self.link, copies, rank, lambda _: 1)  # type: ignore[arg-type]
        finally:
            self.process.leave()

    def do(self, action: Callable[[CopyWorker], object]) -> None:
        """Something that the engine's own thread does in this process."""
        former = self.process.kernel.process
        self.process.enter()
        try:
            action(self.copier)
        finally:
            self.process.kernel.process = former

    def collect(self) -> None:
        """Take what has ended."""
        if self.process.is_alive and not self.process.is_stopped():
            self.do(lambda copier: self.outcomes.update((end.id, end) for end in copier.take_outcomes()))


def registration(model: Model, role: str, rank: int) -> Register:
    """What a process of an engine says of itself."""
    group = KernelGroup(
        num_layers=1,
        num_blocks=24,
        block_tokens=16,
        num_heads=1,
        head_size=1,
        dtype="torch.uint8",
        is_mla=False,
        attention_backend="sim",
        shape="NB",
        concrete_shape="24",
    )
    is_worker = role == "worker"
    return Register(
        0,
        role=role,
        model=model.name,
        engine="sim 1",
        rank=rank,
        world_size=model.world_size,
        extent_bytes=model.extent_bytes if is_worker else 0,
        groups=(group,) if is_worker else (),
        namespace=b"" if is_worker else sha256(model.name.encode()).digest()[:KEY_BYTES],
    )
