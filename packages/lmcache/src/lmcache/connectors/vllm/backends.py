"""Which attention backend reads a vLLM engine's KV: what the configuration says, and what the workers chose.

The scheduler's process names chunks and knows the configuration only. On an accelerator each worker chooses the
backend of its layers by the hardware, unless the user named one. What follows from the configuration alone is decided
here for both sides; a worker then checks it against the layers that it has.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lmcache.errors import LayoutError
from lmcache.layout import transparent_backends

if TYPE_CHECKING:
    from vllm.config import VllmConfig

ENGINE = "vllm"

_STOCK_MODELS = "vllm.model_executor.models."
"""Models that are built from vLLM's own attention layers. Those of ``vllm.models`` and of other packages bring
attention, and kinds of KV, of their own."""

_UNLISTED = {"DEEPSEEK_V32_INDEXER": "vllm.v1.attention.backends.mla.indexer.DeepseekV32IndexerBackend"}
"""Classes of backends that vLLM's enumeration does not have: a layer brings them along."""


def device() -> str:
    """The kind of device; ROCm, which vLLM calls "cuda" too, is "rocm"."""
    from vllm.platforms import current_platform

    return "cuda" if current_platform.is_cuda() else str(current_platform.device_name)


def attention_backend(vllm_config: VllmConfig, spec: Any) -> str:
    """vLLM's name of the backend of layers with this spec; on an accelerator "" unless the user named one."""
    from vllm.platforms import current_platform

    attention = vllm_config.attention_config
    chosen = getattr(attention, "backend", None)
    if per_kind := getattr(attention, "backend_per_kind", None):
        from vllm.v1.kv_cache_interface import get_kv_cache_spec_kind

        chosen = per_kind.get(get_kv_cache_spec_kind(spec).value, chosen)
    if chosen is not None:
        return str(getattr(chosen, "name", chosen))
    if current_platform.is_cpu():
        return "CPU_MLA" if vllm_config.model_config.use_mla else "CPU_ATTN"
    return ""


def has_stock_attention(vllm_config: VllmConfig) -> bool:
    """Whether the model's layers, and the draft model's, are vLLM's own attention layers.

    Only then is a worker's choice of backend one among those that vLLM tries on the platform, whose packing shows in
    the layers' specs.
    """
    from vllm.model_executor.models.registry import ModelRegistry

    drafts = getattr(vllm_config.speculative_config, "draft_model_config", None)
    configs = [config for config in (vllm_config.model_config, drafts) if config is not None]
    return all(
        str(getattr(ModelRegistry.models.get(config.architecture), "module_name", "")).startswith(_STOCK_MODELS)
        for config in configs
    )


def chosen_backend(vllm_config: VllmConfig, names: Iterable[str], named: str) -> str:
    """The backend of layers whose chunks are canonical, as the worker has them; ``named`` where none of them tells.

    Raises:
        LayoutError: the kernels of one are not known to read a block element by element. The scheduler's side, which
            cannot see that, names canonical chunks, so this worker must store none.
    """
    layers = getattr(vllm_config.compilation_config, "static_forward_context", {})
    found = named
    for name in names:
        tell = getattr(layers.get(name), "get_attn_backend", None)
        if tell is None:
            if not named:
                raise LayoutError(f"of KV layer {name} it cannot be told which attention backend reads it")
            continue
        backend = tell()
        path = f"{backend.__module__}.{backend.__qualname__}"
        found = str(backend.get_name())
        if found not in transparent_backends(ENGINE, device()) or path != _expected_path(found):
            remedy = "" if named else f"; with --attention-backend {found} whole blocks are cached"
            raise LayoutError(
                f"KV layer {name} is read by attention backend {found} ({path}), which is not known to read a block "
                f"element by element{remedy}"
            )
    return found


def _expected_path(name: str) -> str | None:
    """vLLM's own class of a backend: a plug-in may have put another in its place."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return _UNLISTED.get(name) or getattr(AttentionBackendEnum.__members__.get(name), "value", None)
