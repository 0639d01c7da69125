"""Status documents of earlier generations of servers, turned into the present shape (see ``api.Status``).

What changed over time: the map of engine processes was called `gpu_context_meta` and keyed by GPU; the layout was
flat, one group of layers with `block_size` and `gpu_kv_*`; then `kernel_groups` with `physical_block_size`; the
eviction policy lay under `eviction_controller`; and servers with several L1 pools send maps `l1_managers`,
`l1_eviction_controllers`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PATH_HEALTH = "/api/healthcheck"
PATH_STATUS = "/api/status"
PATHS_CLEAR = ("/clear-cache", "/api/clear-cache")  # 0.4.5 to 0.5.0, and before

Document = Mapping[str, Any]

_GROUP_NAMES = {
    "block_size": "tokens_per_block",
    "physical_block_size": "tokens_per_block",
    "inference_engine_logical_block_size": "tokens_per_block",
    "hidden_dim_sizes": "hidden_dim_size",
    "gpu_kv_shape": "engine_kv_shape",
    "gpu_kv_concrete_shape": "engine_kv_concrete_shape",
}


def modern_status(document: Document) -> dict[str, Any]:
    """``document`` with every older name and shape we know replaced; what is already modern stays untouched."""
    status = dict(document)
    by_gpu = _mapping(status.get("gpu_context_meta"))
    instances = _mapping(status.get("cache_context_meta")) or _mapping(status.get("cb_gpu_context_meta")) or by_gpu
    status["cache_context_meta"] = {
        name: _instance(meta, name if instances is by_gpu else None)
        for name, meta in instances.items()
        if isinstance(meta, Mapping)
    }
    if isinstance(status.get("storage_manager"), Mapping):
        status["storage_manager"] = _storage_manager(status["storage_manager"])
    return status


def _instance(meta: Document, gpu: str | None) -> dict[str, Any]:
    instance = dict(meta)
    if gpu is not None and gpu.isdecimal():
        instance.setdefault("device_ids", [int(gpu)])
    layout = instance.get("kv_cache_layout")
    if isinstance(layout, Mapping):
        groups = layout.get("kernel_groups")
        flat = not isinstance(groups, list)
        members = [layout] if flat else [group for group in groups or () if isinstance(group, Mapping)]
        instance["kv_cache_layout"] = {**layout, "kernel_groups": [_group(group) for group in members]}
    return instance


def _group(group: Document) -> dict[str, Any]:
    renamed = {_GROUP_NAMES.get(key, key): value for key, value in group.items()}
    size = renamed.get("hidden_dim_size")
    if isinstance(size, str):  # the text of a list: "[1024]"
        size = [int(digits) for digits in re.findall(r"\d+", size)]
    if isinstance(size, list):
        renamed["hidden_dim_size"] = size[0] if size else None
    return renamed


def _storage_manager(document: Document) -> dict[str, Any]:
    manager = dict(document)
    if "l1_eviction_controller" not in manager:
        several = list(_mapping(manager.get("l1_eviction_controllers")).values())
        manager["l1_eviction_controller"] = manager.get("eviction_controller") or (several[0] if several else None)
    pools = [pool for pool in _mapping(manager.get("l1_managers")).values() if isinstance(pool, Mapping)]
    if "l1_manager" not in manager and pools:
        sums = {
            key: sum(pool[key] for pool in pools)
            for key in ("memory_total_bytes", "memory_used_bytes", "total_object_count")
            if all(isinstance(pool.get(key), int) for pool in pools)
        }
        manager["l1_manager"] = sums
    return manager


def _mapping(value: object) -> Document:
    return value if isinstance(value, Mapping) else {}
