"""`lmcache describe kvcache`: what a running cache server holds. Reads tolerantly: what is not said is N/A."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from lmcache_cli import api
from lmcache_cli.commands.base import KVCACHE, BaseCommand, failed, server_options
from lmcache_cli.commands.describe_engine import describe_engine
from lmcache_cli.errors import Unhealthy
from lmcache_cli.groups import Group
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

TITLE = "LMCache KV Cache Service"
WIDTH = 50
KEYS = (
    *("health", "url", "engine_type", "chunk_size", "l1_capacity_gb", "l1_capacity_bytes", "l1_used_gb"),
    *("l1_used_bytes", "l1_usage_ratio", "eviction_policy", "cached_objects", "active_sessions"),
)
LISTS = ("models", "l2_adapters")

_UNITS = ("B", "KB", "MB", "GB", "TB")


@click.group(cls=Group)
def describe() -> None:
    """Show the state of a running service."""


describe.add_command(describe_engine)


@describe.command("kvcache", cls=BaseCommand, title=TITLE, keys=KEYS, list_names=LISTS, watch=True)
@server_options(KVCACHE)
def describe_kvcache(target: Target) -> Report:
    """Show health, memory, registered models and L2 adapters of an LMCache server.

    Exit status 1: it cannot be reached, or says that it is not healthy.
    """
    from lmcache_cli.client import CacheServer

    with CacheServer(target) as server:
        status = server.status()
    report = status_report(status, target.url)
    if status.is_healthy is False:
        reason = f": {status.reason}" if status.reason else ""
        return failed(report, Unhealthy(f"{target.url} says that it is not healthy{reason}"))
    return report


def status_report(status: api.Status, url: str) -> Report:
    """The report on ``status``, which ``url`` answered."""
    storage = status.storage_manager or api.StorageManager()
    sections = [
        _overview(status, url),
        *(_model(instances) for instances in _by_model(status.cache_context_meta.values())),
        *(_adapter(adapter) for adapter in storage.l2_adapters),
        *_quarantined(status),
    ]
    return Report(TITLE, WIDTH, sections, list_names=LISTS)


def _overview(status: api.Status, url: str) -> Section:
    storage = status.storage_manager or api.StorageManager()
    l1 = storage.l1_manager or api.L1Manager()
    eviction = storage.l1_eviction_controller or api.EvictionController()
    ratio = l1.memory_usage_ratio
    if ratio is None:
        ratio = _ratio(l1.memory_used_bytes, l1.memory_total_bytes)
    return Section(
        [
            Entry("health", "Health", _health(status.is_healthy)),
            Entry("url", "URL", url),
            Entry("engine_type", "Engine type", status.engine_type),
            Entry("chunk_size", "Chunk size", status.chunk_size),
            Entry("l1_capacity_gb", "L1 capacity (GB)", _gb(l1.memory_total_bytes)),
            Entry("l1_capacity_bytes", None, l1.memory_total_bytes),
            Entry("l1_used_gb", "L1 used (GB)", _with_share(_two_decimals(_gb(l1.memory_used_bytes)), ratio)),
            Entry("l1_used_bytes", None, l1.memory_used_bytes),
            Entry("l1_usage_ratio", None, ratio),
            Entry("eviction_policy", "Eviction policy", eviction.eviction_policy),
            Entry("cached_objects", "Cached objects", l1.total_object_count),
            Entry("active_sessions", "Active sessions", status.active_sessions),
        ]
    )


def _by_model(instances: Iterable[api.Instance]) -> list[list[api.Instance]]:
    """Engine processes that serve one model at one world size, together; in order of appearance."""
    models: dict[tuple[str | None, int | None], list[api.Instance]] = {}
    for instance in instances:
        models.setdefault((instance.model_name, instance.world_size), []).append(instance)
    return list(models.values())


def _model(instances: list[api.Instance]) -> Section:
    first = instances[0]
    gpus = sorted({device for instance in instances for device in instance.device_ids})
    layout = next((i.kv_cache_layout for i in instances if i.kv_cache_layout is not None), api.KVCacheLayout())
    groups = layout.kernel_groups
    group = groups[0] if groups else api.KernelGroup()
    num_layers = layout.num_layers if group.num_layers is None else group.num_layers
    num_blocks = layout.num_blocks if group.num_blocks is None else group.num_blocks
    entries = [
        Entry("model", "Model", first.model_name),
        Entry("world_size", "World size", first.world_size),
        Entry("gpu_ids", "GPU IDs", ", ".join(map(str, gpus)) or None),
        Entry("gpu_id_list", None, gpus),
        Entry("attention_backend", "Attention backend", group.attention_backend),
        Entry("gpu_kv_shape", "GPU KV shape", group.engine_kv_shape),
        Entry("gpu_kv_concrete_shape", "GPU KV tensor shape", group.engine_kv_concrete_shape),
        Entry("num_layers", "Num layers", num_layers),
        Entry("block_size", "Block size", group.tokens_per_block),
        Entry("hidden_dim_size", "Hidden dim size", group.hidden_dim_size),
        Entry("dtype", "Dtype", group.dtype),
        Entry("is_mla", "MLA", group.is_mla),
        Entry("num_blocks", "Num blocks", num_blocks),
    ]
    if len(groups) > 1:
        entries.append(Entry("kernel_groups", None, api.to_json(layout)["kernel_groups"]))
    return Section(entries, label=f"Model: {first.model_name or 'N/A'}", list_name="models")


def _adapter(adapter: api.L2Adapter) -> Section:
    pool_used = None
    if adapter.pool_size is not None and adapter.pool_free_slots is not None:
        pool_used = adapter.pool_size - adapter.pool_free_slots
    pool_text = None if pool_used is None else f"{pool_used} / {adapter.pool_size}"
    entries = [
        Entry("type", "Type", adapter.type),
        Entry("health", "Health", _health(adapter.is_healthy)),
        Entry("backend", "Backend", adapter.backend),
        Entry("stored_object_count", "Stored objects", adapter.stored_object_count),
        Entry("pool_used", "Pool used", _with_share(pool_text, _ratio(pool_used, adapter.pool_size))),
        Entry("pool_used_slots", None, pool_used),
        Entry("pool_capacity_slots", None, adapter.pool_size),
    ]
    if adapter.reason is not None:
        entries.insert(2, Entry("reason", "Reason", adapter.reason))
    if adapter.name is not None:
        entries.append(Entry("name", None, adapter.name))
    if adapter.base_path is not None:
        entries.append(Entry("base_path", "Base path", adapter.base_path))
    if adapter.current_size_bytes is not None:
        used, capacity = adapter.current_size_bytes, adapter.max_capacity_bytes
        text = _size(used) if capacity is None else f"{_size(used)} / {_size(capacity)}"
        entries += [
            Entry("used", "Used", _with_share(text, _ratio(used, capacity))),
            Entry("used_bytes", None, used),
            Entry("capacity_bytes", None, capacity),
        ]
    return Section(entries, label=f"L2: {adapter.type or 'N/A'}", list_name="l2_adapters")


def _quarantined(status: api.Status) -> Iterable[Section]:
    """How many, and one line for each that is named; nothing where none is."""
    if not status.quarantined:
        return
    yield Section([Entry("quarantined_count", "Taken out at use", status.quarantined_count)], label="Quarantined")
    for spoiled in status.quarantined:
        age_s = spoiled.age_s
        where = [
            spoiled.tier,
            spoiled.found_at and f"at {spoiled.found_at}",
            None if spoiled.rank is None else f"rank {spoiled.rank}",
            None if age_s is None else f"{age_s:.0f} s ago",
        ]
        entries = [
            Entry("key", spoiled.key or "N/A", spoiled.key, text=", ".join(filter(None, where)) or None),
            Entry("namespace", None, spoiled.namespace),
            Entry("rank", None, spoiled.rank),
            Entry("found_at", None, spoiled.found_at),
            Entry("tier", None, spoiled.tier),
            Entry("age_s", None, age_s),
        ]
        yield Section(entries, list_name="quarantined")


def _health(is_healthy: bool | None) -> str | None:
    return None if is_healthy is None else "OK" if is_healthy else "UNHEALTHY"


def _ratio(used: int | None, total: int | None) -> float | None:
    return used / total if used is not None and total else None


def _with_share(text: str | None, ratio: float | None) -> str | None:
    return text if text is None or ratio is None else f"{text} ({ratio:.1%})"


def _gb(size_bytes: int | None) -> float | None:
    """1 GB is 2^30 bytes, here as everywhere."""
    return None if size_bytes is None else round(size_bytes / 2**30, 2)


def _two_decimals(value: Any) -> str | None:
    return None if value is None else f"{value:.2f}"


def _size(size_bytes: int) -> str:
    value = float(size_bytes)
    for unit in _UNITS:
        if value < 1024 or unit == _UNITS[-1]:
            break
        value /= 1024
    return f"{size_bytes} B" if unit == "B" else f"{value:.2f} {unit}"
