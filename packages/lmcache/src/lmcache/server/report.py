"""The snapshot that the service process asks for: one JSON document with status, counters and gauges."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from lmcache.metrics import Counters, Gauges
from lmcache_cli import api

if TYPE_CHECKING:
    from lmcache.cache.base import Usage
    from lmcache.cache.quarantine import Spoiled
    from lmcache.server.sessions import Instance
    from lmcache.wire.messages import KernelGroup, Register


@dataclass(frozen=True)
class Frame:
    """What the cache does not know of itself."""

    version: str
    chunk_tokens: int
    eviction_policy: str
    uptime_s: float


def document(usage: Usage, counters: Counters, instances: list[Instance], frame: Frame, reason: str | None) -> bytes:
    """``reason`` says why the server is not healthy, None if it is."""
    counters.evicted_chunks = usage.num_evicted
    counters.quarantined_chunks = usage.num_quarantined
    counters.full_chunks = usage.num_refused_full
    counters.expired_leases = usage.num_expired_leases
    counters.expired_reservations = usage.num_expired_reservations
    counters.lost_chunks = usage.num_lost
    counters.adopted_chunks = usage.num_adopted
    counters.shortened_lookups = usage.num_shortened
    status = _status(usage, instances, frame, reason)
    gauges = Gauges(
        l1_memory_usage_bytes=usage.used_bytes,
        l1_memory_total_bytes=usage.total_bytes,
        l1_memory_ready_bytes=usage.ready_bytes,
        l1_memory_leased_bytes=usage.leased_bytes,
        l1_usage_ratio=usage.used_bytes / usage.total_bytes,
        l1_chunks=usage.num_entries,
        unwritten_chunks=usage.num_unwritten,
        attached_processes=len(instances),
        active_sessions=usage.num_leases + usage.num_reservations,
        uptime_seconds=frame.uptime_s,
    )
    return json.dumps({"status": api.to_json(status), "counters": asdict(counters), "gauges": asdict(gauges)}).encode()


def quarantined(spoiled: Spoiled, found_at: str, tier: str) -> api.Quarantined:
    """A chunk that is named in ``/status``."""
    namespace = None if spoiled.namespace is None else spoiled.namespace.hex()
    return api.Quarantined(spoiled.key.hex(), namespace, spoiled.rank, found_at, tier, spoiled.age_s)


def _status(usage: Usage, instances: list[Instance], frame: Frame, reason: str | None) -> api.Status:
    is_healthy = reason is None
    l1 = api.L1Manager(
        is_healthy=is_healthy,
        total_object_count=usage.num_entries,
        write_locked_count=usage.num_reserved_entries,
        read_locked_count=usage.num_leased_entries,
        memory_used_bytes=usage.used_bytes,
        memory_total_bytes=usage.total_bytes,
        memory_ready_bytes=usage.ready_bytes,
        memory_leased_bytes=usage.leased_bytes,
        memory_usage_ratio=usage.used_bytes / usage.total_bytes,
    )
    workers = {
        str(item.id): item.registration
        for item in instances
        if item.registration is not None and item.registration.role == "worker"
    }
    return api.Status(
        is_healthy=is_healthy,
        reason=reason,
        engine_type=api.ENGINE_TYPE,
        version=frame.version,
        chunk_size=frame.chunk_tokens,
        hash_algorithm="sha256",
        active_sessions=usage.num_leases + usage.num_reservations,
        attached_processes=len(instances),
        uptime_s=frame.uptime_s,
        quarantined_count=usage.num_quarantined,
        quarantined=[quarantined(spoiled, "use", "l1") for spoiled in usage.quarantined],
        storage_manager=api.StorageManager(
            is_healthy=is_healthy,
            l1_manager=l1,
            l1_eviction_controller=api.EvictionController(is_healthy, frame.eviction_policy),
            eviction_controller=api.EvictionController(is_healthy, frame.eviction_policy),
            l2_adapters=[],
        ),
        registered_gpu_ids=sorted({device for worker in workers.values() for device in worker.device_ids}),
        cache_context_meta={name: _instance(worker, frame.chunk_tokens) for name, worker in workers.items()},
    )


def _instance(worker: Register, chunk_tokens: int) -> api.Instance:
    groups = [_group(index, group) for index, group in enumerate(worker.groups)]
    layout = api.KVCacheLayout(
        num_layers=sum(group.num_layers for group in worker.groups),
        num_blocks=worker.groups[0].num_blocks if worker.groups else None,
        cache_size_per_token=worker.extent_bytes // chunk_tokens,
        kernel_groups=groups,
    )
    return api.Instance(
        model_name=worker.model,
        world_size=worker.world_size,
        rank=worker.rank,
        engine=worker.engine,
        device_ids=list(worker.device_ids),
        kv_cache_layout=layout,
    )


def _group(index: int, group: KernelGroup) -> api.KernelGroup:
    return api.KernelGroup(
        kernel_group_idx=index,
        num_layers=group.num_layers,
        num_blocks=group.num_blocks,
        tokens_per_block=group.block_tokens,
        num_heads=group.num_heads,
        head_size=group.head_size,
        hidden_dim_size=group.num_heads * group.head_size,
        dtype=group.dtype,
        is_mla=group.is_mla,
        attention_backend=group.attention_backend,
        engine_kv_shape=group.shape,
        engine_kv_concrete_shape=group.concrete_shape,
    )
