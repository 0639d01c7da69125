"""Typed face of the compiled copy engine (csrc/bindings.cpp)."""

from typing_extensions import Buffer

HAS_CUDA: bool

def features() -> str:
    """Instruction set chosen on this machine: "avx512", "avx2" or "portable"."""

def xxh3_64(data: Buffer, seed: int = 0) -> int:
    """XXH3-64 of ``data`` as its specification defines it."""

def checksum(data: Buffer, seed: int) -> int:
    """Checksum of one extent: XXH3-64, seeded, over the little-endian XXH3-64 (seed 0) of its 16 KiB leaves."""

def store(
    pool: Buffer,
    planes: Buffer,
    groups: Buffer,
    blocks: Buffer,
    offsets: Buffer,
    seeds: Buffer,
    threads: int,
) -> bytes:
    """Gather engine blocks into extents of the pool and return the checksum (uint64, little-endian) of each extent.

    The bytes of an extent are, for each group, for each plane of it, for each block of the chunk in order, for i0, for
    i1, for i2: the run at ``address + block * block_stride + i0 * s0 + i1 * s1 + i2 * s2``. Releases the GIL.

    Args:
        pool: the mapped pool, writable.
        planes: uint64 [num_planes, 9]: address, block_stride, c0, s0, c1, s1, c2, s2, run. A dim that is not there
            counts 1. Strides are bytes, negative ones as two's complement. That no two planes share a byte is for
            ``lmcache.layout`` to establish.
        groups: uint64 [num_groups, 3]: num_planes, num_blocks, blocks_per_chunk; planes of the first group come first.
        blocks: int64 [num_chunks, sum of blocks_per_chunk]: block ids, group after group, each below its group's
            num_blocks.
        offsets: uint64 [num_chunks]: where in the pool each chunk's extent starts.
        seeds: uint64 [num_chunks].
        threads: how many threads copy, 1 or more; they run on any CPU of the machine, whatever the caller is pinned to.

    Raises:
        ValueError: an argument does not fit the others, or would reach outside the pool or the engine's blocks.
        OSError: the pool is guarded, and memory of it is gone.
    """

def retrieve(
    pool: Buffer,
    planes: Buffer,
    groups: Buffer,
    blocks: Buffer,
    offsets: Buffer,
    seeds: Buffer,
    checksums: Buffer,
    threads: int,
) -> bytes:
    """Scatter extents into engine blocks; returns a byte a chunk, 1 where the bytes had the expected checksum.

    Arguments as for ``store``. A block id of -1 means: this block's bytes count for the checksum but are written
    nowhere. A group's block may be named once in all chunks. The checksum covers the very loads that were written.
    ``checksums``: uint64 [num_chunks].
    """

def populate(pool: Buffer, offset: int, length: int) -> None:
    """Enter the pages of a range that exist into this process's page table (MADV_POPULATE_WRITE). Releases the GIL.

    Raises:
        OSError: what madvise said.
    """

def guard(memory: Buffer) -> int:
    """Let no page of this mapping that is taken away (a file that was cut) end this process: zeros of its own take the
    page's place, whoever touches it. Returns a slot for ``unguard``, or -1 where there is none left.

    ``store``, ``retrieve`` and ``checksum`` raise OSError (EFAULT) once that has happened to the mapping they touch.
    """

def unguard(slot: int) -> None:
    """End a guard, before its memory is unmapped."""

def lost(memory: Buffer) -> bool:
    """Whether a page of the guarded mapping around this memory was taken away and touched since."""

def pack_tokens(tokens: list[int]) -> bytes:
    """Token ids as little-endian uint32: ``lmcache.keys.pack_tokens``, which is its definition, for a list and faster.

    Raises:
        OverflowError: an id below 0 or above 2**32 - 1.
        TypeError: an item that is no int.
    """

class Busy(RuntimeError):
    """As many plans are under way as may be; where ``HAS_CUDA``."""

class DeviceCopier:
    """Copies between one GPU's paged memory and a pool, enqueued on the caller's streams; where ``HAS_CUDA``.

    Args:
        pool: the mapped pool, writable; kept alive.
        planes, groups: as of ``store``, with addresses of the device's.
        device: number of the GPU.
        staging_bytes: device memory of the staging ring, and at least as much pinned memory of the host.
        plans_max: plans under way at once.
        thread_blocks_max: of one copy.
        direct_bytes_max: extents up to this size are reached by the kernel itself, larger ones by DMA.

    Raises:
        RuntimeError: what CUDA said; also of every call below, and of every call after one that said so.
    """

    def __init__(
        self,
        pool: Buffer,
        planes: Buffer,
        groups: Buffer,
        device: int,
        staging_bytes: int,
        plans_max: int,
        thread_blocks_max: int,
        direct_bytes_max: int = ...,
    ) -> None: ...
    @property
    def extent_bytes(self) -> int:
        """Bytes of one extent."""

    @property
    def chunks_max(self) -> int:
        """Chunks that one plan may have."""

    def register(self, offset: int, length: int) -> None:
        """Let the device reach a range of the pool, which takes milliseconds. Releases the GIL."""

    def store(self, blocks: Buffer, offsets: Buffer, seeds: Buffer, stream: int) -> int:
        """Enqueue a plan that gathers; returns its ticket.

        Raises:
            ValueError: as of the module's ``store``; extents begin at multiples of 16.
            Busy: as many plans are under way as may be.
        """

    def retrieve(self, blocks: Buffer, offsets: Buffer, seeds: Buffer, checksums: Buffer, stream: int) -> int:
        """Enqueue a plan that scatters; returns its ticket. Errors as of ``store``."""

    def finish(self, ticket: int) -> bytes | None:
        """None while the plan is under way; then, once, uint64 [num_chunks]: checksums, or 1 or 0 for a retrieve.

        Raises:
            ValueError: no plan under way has this ticket.
            OSError: the pool is guarded, and memory of it is gone.
        """
