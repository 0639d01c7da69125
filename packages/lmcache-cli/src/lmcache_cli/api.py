"""The HTTP contract, once: paths, and the shape of every body. The server builds these classes, the client reads them.

Reading is tolerant, since servers of other versions and of the upstream project answer too: what is absent is None,
what is unknown is ignored, what has the wrong type counts as absent. Writing is exact.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar
from urllib.parse import quote

HTTP_PORT = 8080
RPC_PORT = 5555
ENGINE_PORT = 8000

PATH_ROOT = "/"
PATH_HEALTH = "/healthcheck"
PATH_STATUS = "/status"
PATH_VERSION = "/version"
PATH_CONFIG = "/config"
PATH_METRICS = "/metrics"
PATH_CLEAR = "/cache/clear"
PATH_QUOTA = "/quota"  # of one tenant: quota_path(salt)
PATH_LOOKUP = "/cache/lookup"

DEFAULT_SALT = "_default"  # stands for the empty cache salt in a path

ENGINE_TYPE = "LMCacheServer"

# what is asked of a serving engine (OpenAI's API, and vLLM's health check)
ENGINE_PATH_HEALTH = "/health"
ENGINE_PATH_MODELS = "/v1/models"
ENGINE_PATH_COMPLETIONS = "/v1/completions"
ENGINE_PATH_CHAT = "/v1/chat/completions"
ENGINE_PATH_TOKENIZE = "/tokenize"

T = TypeVar("T")


@dataclass(frozen=True)
class Health:
    """GET /healthcheck: 200 while a real message went through the core within the last second, else 503."""

    status: str  # "healthy" | "unhealthy"
    reason: str | None = None


@dataclass(frozen=True)
class L1Manager:
    """The pool. Bytes are bytes; ``memory_used_bytes`` counts extents that hold or await a chunk."""

    is_healthy: bool | None = None
    total_object_count: int | None = None
    write_locked_count: int | None = None  # entries with a reservation
    read_locked_count: int | None = None  # entries with a lease
    memory_used_bytes: int | None = None
    memory_total_bytes: int | None = None
    memory_ready_bytes: int | None = None  # allocated so far; grows to the total in the background
    memory_leased_bytes: int | None = None
    memory_usage_ratio: float | None = None


@dataclass(frozen=True)
class EvictionController:
    """Which policy frees memory."""

    is_healthy: bool | None = None
    eviction_policy: str | None = None


@dataclass(frozen=True)
class L2Adapter:
    """One tier below L1."""

    is_healthy: bool | None = None
    type: str | None = None
    name: str | None = None  # its label in metrics
    reason: str | None = None  # why it is not healthy, or does less than it should
    backend: str | None = None
    base_path: str | None = None
    stored_object_count: int | None = None
    pool_size: int | None = None
    pool_free_slots: int | None = None
    current_size_bytes: int | None = None
    max_capacity_bytes: int | None = None


@dataclass(frozen=True)
class StorageManager:
    """L1 and what lies below it."""

    is_healthy: bool | None = None
    l1_manager: L1Manager | None = None
    l1_eviction_controller: EvictionController | None = None
    eviction_controller: EvictionController | None = None  # the same once more, where upstream's command line looks
    l2_adapters: list[L2Adapter] = field(default_factory=list)


@dataclass(frozen=True)
class KernelGroup:
    """Layers of an engine that share a layout."""

    kernel_group_idx: int | None = None
    num_layers: int | None = None
    num_blocks: int | None = None
    tokens_per_block: int | None = None
    num_heads: int | None = None
    head_size: int | None = None
    hidden_dim_size: int | None = None  # heads x head size on one rank
    dtype: str | None = None
    is_mla: bool | None = None
    attention_backend: str | None = None
    engine_kv_shape: str | None = None
    engine_kv_concrete_shape: str | None = None


@dataclass(frozen=True)
class KVCacheLayout:
    """The KV memory of one engine process."""

    num_layers: int | None = None
    num_blocks: int | None = None
    cache_size_per_token: int | None = None  # bytes on one rank
    kernel_groups: list[KernelGroup] = field(default_factory=list)


@dataclass(frozen=True)
class Instance:
    """One registered engine process that copies."""

    model_name: str | None = None
    world_size: int | None = None
    rank: int | None = None
    engine: str | None = None
    device_ids: list[int] = field(default_factory=list)
    kv_cache_layout: KVCacheLayout | None = None


@dataclass(frozen=True)
class Quarantined:
    """A chunk that was taken out because its bytes were not what was stored."""

    key: str | None = None  # its first 8 bytes, in hexadecimal; so is the namespace
    namespace: str | None = None
    rank: int | None = None  # whose bytes were wrong; None: not told
    found_at: str | None = None  # "use": an engine loaded it, "promotion": it was read from a tier into L1
    tier: str | None = None  # "l1", or the name of the tier that had it
    age_s: float | None = None  # since it was found


@dataclass(frozen=True)
class Status:
    """GET /status."""

    is_healthy: bool | None = None
    reason: str | None = None  # why it is not healthy
    engine_type: str | None = None
    version: str | None = None
    chunk_size: int | None = None
    hash_algorithm: str | None = None
    active_sessions: int | None = None  # requests that hold a lease or a reservation
    attached_processes: int | None = None
    uptime_s: float | None = None
    quarantined_count: int | None = None  # entries taken out because their bytes failed the check at use
    quarantined: list[Quarantined] = field(default_factory=list)  # the last ones, at use or promotion, newest first
    storage_manager: StorageManager | None = None
    registered_gpu_ids: list[int] = field(default_factory=list)
    cache_context_meta: dict[str, Instance] = field(default_factory=dict)  # by instance id


@dataclass(frozen=True)
class ClearRequest:
    """POST /cache/clear; the body may be left out."""

    tier: str = "l1"
    force: bool = False  # accepted for upstream's clients; what a lease or reservation holds is never dropped


@dataclass(frozen=True)
class Cleared:
    """Answer to POST /cache/clear."""

    tier: str | None = None
    num_entries: int | None = None
    num_kept: int | None = None


@dataclass(frozen=True)
class ClearReply:
    """Envelope of ``Cleared``."""

    status: str | None = None
    cleared: Cleared | None = None


@dataclass(frozen=True)
class Quota:
    """GET /quota/{salt}: the limit of one tenant, in L1 and in each tier; an unknown one does not exist.

    1 GB = 2**30 bytes.
    """

    cache_salt: str | None = None
    limit_gb: float | None = None
    current_usage_gb: float | None = None  # of L1; None: not known
    usage_by_tier_gb: dict[str, float] = field(default_factory=dict)  # "l1", and tiers that can tell
    exists: bool | None = None


@dataclass(frozen=True)
class QuotaUser:
    """One tenant of the list."""

    limit_gb: float | None = None
    current_usage_gb: float | None = None  # of L1; None: not known
    usage_by_tier_gb: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class QuotaList:
    """GET /quota: every tenant with a limit, by cache salt."""

    users: dict[str, QuotaUser] = field(default_factory=dict)


@dataclass(frozen=True)
class QuotaLimit:
    """PUT /quota/{salt}."""

    limit_gb: float


@dataclass(frozen=True)
class QuotaChange:
    """Answer to PUT and DELETE /quota/{salt}."""

    cache_salt: str | None = None
    limit_gb: float | None = None  # PUT only
    status: str | None = None  # "ok" (PUT), "removed" | "not_found" (DELETE)


@dataclass(frozen=True)
class LookupRequest:
    """POST /cache/lookup: which chunks of these tokens are held? Nothing is moved, kept or counted by asking."""

    token_ids: list[int]
    model_name: str | None = None  # None: for every model that the server has met
    cache_salt: str = ""


@dataclass(frozen=True)
class ChunkPlace:
    """Where one whole chunk lies."""

    index: int | None = None
    first_token: int | None = None
    num_tokens: int | None = None
    tier: str | None = None  # "l1", or the name of the tier below it; None: not held


@dataclass(frozen=True)
class ModelPrefix:
    """What is held for one model; a model that engines run in two ways (dtype, ranks, ...) is listed once for each."""

    model_name: str | None = None
    engine: str | None = None
    world_size: int | None = None
    held_tokens: int | None = None  # the longest prefix that is held without a gap
    chunks: list[ChunkPlace] = field(default_factory=list)


@dataclass(frozen=True)
class LookupReply:
    """Answer to POST /cache/lookup. Tokens after the last whole chunk belong to no chunk."""

    chunk_size: int | None = None
    num_tokens: int | None = None
    models: list[ModelPrefix] = field(default_factory=list)


def quota_path(salt: str) -> str:
    """Path of one tenant's quota. Every byte of the salt that could mean something in a URL is escaped.

    Raises:
        ValueError: the salt cannot be written as UTF-8.
    """
    if not salt:
        return f"{PATH_QUOTA}/{DEFAULT_SALT}"
    escaped = quote(salt, safe="")
    if salt in (".", "..", DEFAULT_SALT):  # would be taken for a folder, or for the empty salt
        escaped = escaped.replace(".", "%2E").replace("_", "%5F")
    return f"{PATH_QUOTA}/{escaped}"


def to_json(value: Any) -> Any:
    """A contract object as plain JSON values."""
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def from_json(cls: type[T], document: object) -> T:
    """Read ``cls`` out of a JSON object, tolerantly (see the module's docstring).

    Raises:
        ValueError: the document is no JSON object at all.
    """
    if not isinstance(document, Mapping):
        raise ValueError(f"expected a JSON object, got {type(document).__name__}")
    hints = typing.get_type_hints(cls)
    values = {}
    for item in fields(cls):  # type: ignore[arg-type]
        if item.name in document:
            read = _read(hints[item.name], document[item.name])
            if read is not _ABSENT:
                values[item.name] = read
    return cls(**values)


_ABSENT = object()


def _read(hint: Any, value: object) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _read(args[0], value) if value is not None else None
    if is_dataclass(hint):
        return from_json(typing.cast(type, hint), value) if isinstance(value, Mapping) else _ABSENT
    if origin is list:
        if not isinstance(value, list):
            return _ABSENT
        return [read for read in (_read(args[0], item) for item in value) if read is not _ABSENT]
    if origin is dict:
        if not isinstance(value, Mapping):
            return _ABSENT
        read_items = {str(key): _read(args[1], item) for key, item in value.items()}
        return {key: item for key, item in read_items.items() if item is not _ABSENT}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, bool):
        return _ABSENT
    return value if isinstance(value, hint) else _ABSENT
