"""Which part of a chunk a worker holds, when the model is split over several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


@dataclass(frozen=True)
class Ranks:
    """``world_size`` parts make a chunk; ``num_workers`` processes hold them, several the same one where KV is
    replicated (MLA under tensor parallelism): of those, one ``writes`` and all load."""

    rank: int
    world_size: int
    num_workers: int
    writes: bool

    @classmethod
    def of(cls, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Ranks:
        """This process's place. In vLLM consecutive tensor-parallel ranks are replicas of each other, if any are."""
        parallel = vllm_config.parallel_config
        replicas = getattr(kv_cache_config, "kv_tp_replicas", None)
        if replicas is None:  # before vLLM 0.32
            replicas = parallel.tensor_parallel_size if vllm_config.model_config.use_mla else 1
        num_workers = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        rank = parallel.rank % num_workers
        return cls(rank // replicas, num_workers // replicas, num_workers, rank % replicas == 0)

    def device_ids(self, kv_caches: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
        """The accelerator that holds this rank's KV; none on a CPU."""
        indices = {t.device.index for t in kv_caches.values() if t.device.type != "cpu" and t.device.index is not None}
        return tuple(sorted(indices))
