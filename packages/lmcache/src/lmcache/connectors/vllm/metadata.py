"""What the scheduler's half tells the workers in each step, and what they answer. vLLM pickles both between its own
processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(frozen=True)
class Store:
    """Chunks to store. ``blocks`` is row-major [num_chunks, blocks_per_chunk], the blocks of a chunk group after
    group. ``of_states``: these are the states of recurrent layers at the ends of chunks, a block a group each."""

    job: int
    request_id: str
    keys: bytes
    blocks: tuple[int, ...]
    salt: str
    namespace: bytes
    of_states: bool = False


@dataclass(frozen=True)
class Load:
    """Chunks to load under a lease. ``blocks`` as in ``Store``; ``offsets`` and ``checksums`` are row-major
    [num_chunks, world_size]. ``state``: with them the state at their end, under the same job; the load is over when
    both are, and good when both are."""

    job: int
    request_id: str
    server: bytes
    keys: bytes
    blocks: tuple[int, ...]
    offsets: tuple[int, ...]
    checksums: tuple[int, ...]
    state: Load | None = None


@dataclass
class StepMetadata(KVConnectorMetadata):
    """One step's orders."""

    stores: list[Store] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    marked: list[int] = field(default_factory=list)  # store jobs whose blocks the engine takes away before this step
    closing: list[str] = field(default_factory=list)  # finished requests whose blocks wait for their stores


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """What ended on the workers: how many ranks have finished a job, which chunks of a load failed on any of them, and
    the loads whose state did."""

    ended: dict[int, int] = field(default_factory=dict)
    failed: dict[int, set[int]] = field(default_factory=dict)
    failed_states: set[int] = field(default_factory=set)
    unable: set[int] = field(default_factory=set)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> StepReport:
        """The reports of two ranks as one."""
        assert isinstance(other, StepReport)
        failed = {job: set(chunks) for job, chunks in self.failed.items()}
        failed_states, unable = self.failed_states | other.failed_states, self.unable | other.unable
        merged = StepReport(dict(self.ended), failed, failed_states, unable)
        for job, count in other.ended.items():
            merged.ended[job] = merged.ended.get(job, 0) + count
        for job, chunks in other.failed.items():
            merged.failed.setdefault(job, set()).update(chunks)
        return merged
