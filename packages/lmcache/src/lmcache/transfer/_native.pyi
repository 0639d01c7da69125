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
    segments: Buffer,
    num_blocks: int,
    blocks: Buffer,
    offsets: Buffer,
    seeds: Buffer,
    threads: int,
) -> bytes:
    """Gather engine blocks into extents of the pool and return the checksum (uint64, little-endian) of each extent.

    The bytes of an extent are, for each block of its chunk in order, each segment in order. Releases the GIL.

    Args:
        pool: the mapped pool, writable.
        segments: uint64 [num_segments, 3]: address of the segment in block 0, distance in bytes from a block to the
            next, length in bytes.
        num_blocks: blocks that the engine's memory holds; every id must be below it.
        blocks: int64 [num_chunks, blocks_per_chunk]: the engine's block ids.
        offsets: uint64 [num_chunks]: where in the pool each chunk's extent starts.
        seeds: uint64 [num_chunks].
        threads: how many threads copy, 1 or more; they run on any CPU of the machine, whatever the caller is pinned to.

    Raises:
        ValueError: an argument does not fit the others, or would reach outside the pool or the engine's blocks.
        OSError: the pool is guarded, and memory of it is gone.
    """

def retrieve(
    pool: Buffer,
    segments: Buffer,
    num_blocks: int,
    blocks: Buffer,
    offsets: Buffer,
    seeds: Buffer,
    checksums: Buffer,
    threads: int,
) -> bytes:
    """Scatter extents into engine blocks; returns a byte a chunk, 1 where the bytes had the expected checksum.

    Arguments as for ``store``. A block id of -1 means: this block's bytes count for the checksum but are written
    nowhere. The checksum covers the very loads that were written. ``checksums``: uint64 [num_chunks].
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
