"""Which of vLLM's KV is interchangeable: the namespace of an engine, and what stands beside a request's tokens.

Everything that changes the bytes of a block for the same tokens must be in here; leaving something out is silent wrong
output, putting too much in costs a hit. So the rule is: when in doubt, in; what we do not understand is not cached at
all.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from typing import TYPE_CHECKING, Any

from lmcache.connectors.vllm.tensors import declared_groups
from lmcache.connectors.vllm.weights import fingerprint_weights
from lmcache.errors import LayoutError
from lmcache.keys import Value, encode_value
from lmcache.layout import RAW

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_VOLATILE_CONFIG = ("_name_or_path", "transformers_version")


def engine_fields(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> dict[str, Value]:
    """Named fields of the namespace that all requests of this engine share.

    Raises:
        LayoutError: a feature is on under which we do not know what a block means.
    """
    import vllm

    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    for feature in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, feature, 1) > 1:
            raise LayoutError(f"{feature} > 1 is not supported: its blocks hold interleaved tokens")
    fields: dict[str, Value] = {
        "engine": "vllm",
        "engine_version": str(vllm.__version__),
        "config": _model_config(vllm_config),
        "weights": _weights(vllm_config),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_dtype": (
            str(cache.cache_dtype),
            # vLLM shows the scheduler's side one layer's spec of a group whose layers differ.
            tuple(map(str, getattr(cache, "kv_cache_dtype_skip_layers", None) or ())),
            str(getattr(vllm_config.attention_config, "indexer_kv_dtype", None)),
        ),
        "ranks": (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.world_size),
        "speculation": _speculation(vllm_config),
        "layout": _layout(vllm_config, kv_cache_config),
    }
    if getattr(cache, "calculate_kv_scales", False):
        # The scales come from the first batch that this process happens to see.
        fields["kv_scales"] = os.urandom(16)
    return fields


def _model_config(vllm_config: VllmConfig) -> str:
    model = vllm_config.model_config
    config = {key: value for key, value in model.hf_config.to_dict().items() if key not in _VOLATILE_CONFIG}
    described: dict[str, Any] = {"config": config}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if "rope_type" not in rope or rope["rope_type"] != "default":
        # Some rotary schemes (LongRoPE, dynamic NTK) choose their factors by the engine's context length.
        described["max_model_len"] = model.max_model_len
    return json.dumps(described, sort_keys=True, default=str)


def _weights(vllm_config: VllmConfig) -> tuple[Value, ...]:
    model, load_format = vllm_config.model_config, str(vllm_config.load_config.load_format)
    if load_format.endswith("dummy"):
        return ("dummy", model.seed)
    digest = fingerprint_weights(model.model, model.revision)
    if digest is None:
        logger.warning(
            "the weight files of %s cannot be read here, so this engine shares its KV cache with no other", model.model
        )
        return ("unknown", os.urandom(16))
    return (load_format, digest)


def _speculation(vllm_config: VllmConfig) -> Value:
    speculative = vllm_config.speculative_config
    if speculative is None:
        return None
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None:
        return str(getattr(speculative, "method", None))
    return (str(speculative.method), draft.model, fingerprint_weights(draft.model, draft.revision) or os.urandom(16))


def _layout(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> tuple[Value, ...]:
    """The form of an extent, group by group: what a chunk holds, and in which order.

    Canonical chunks (backends whose kernels read a block element by element) are the same for every block size,
    physical order and such backend. Of raw ones, which move as whole blocks, everything that shapes a block's inside
    counts.
    """
    described: list[Value] = []
    groups = zip(kv_cache_config.kv_cache_groups, declared_groups(vllm_config, kv_cache_config), strict=True)
    for group, alike in groups:
        spec = group.kv_cache_spec
        parts: list[Value] = [getattr(spec, "sliding_window", None)]
        for declared, names in alike:
            inside = _inside(vllm_config, kv_cache_config, spec) if declared.form == RAW else None
            parts.append((declared.identity(), names, inside))
        described.append(tuple(parts))
    return tuple(described)


def _inside(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, spec: Any) -> tuple[Value, ...]:
    return (
        type(spec).__name__,
        spec.block_size,
        spec.page_size_bytes,
        getattr(spec, "num_kv_heads", None),
        getattr(spec, "head_size", None),
        str(getattr(spec, "dtype", None)),
        str(getattr(spec, "kv_quant_mode", None)),
        getattr(spec, "num_head_slots", None),
        getattr(spec, "state_content_bytes", None),
        str(getattr(spec, "tokens_per_state", None)),
        str(getattr(kv_cache_config, "kv_cache_layout", None)),
        _platform(vllm_config, spec),
    )


def _platform(vllm_config: VllmConfig, spec: Any) -> tuple[Value, ...]:
    import torch
    from vllm.platforms import current_platform

    backend = str(vllm_config.attention_config.backend)
    if not current_platform.is_cpu():
        return (current_platform.device_name, backend)
    # vLLM's CPU attention packs K by the instruction set it finds; the set is part of what the bytes mean.
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(
        getattr(spec, "dtype", vllm_config.model_config.dtype), spec.block_size, getattr(spec, "head_size", None)
    )
    amx = bool(torch.cpu._is_amx_tile_supported())  # chooses the kernels of latent attention
    return ("cpu", backend, str(current_platform.get_cpu_architecture()), isa, amx)


class Bypass(Exception):
    """This request is not cached; the text says why."""


def request_extras(request: Request, start: int, stop: int, first_feature: int) -> tuple[bytes, int]:
    """What stands beside tokens ``start`` to ``stop``: images, LoRA, salt, prompt embeds. Empty for plain text.

    Args:
        first_feature: vLLM's index of the first multimodal item to consider, as the former call returned it.

    Raises:
        Bypass: something there has no stable identity.
    """
    from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys

    found, first_feature = generate_block_hash_extra_keys(request, start, stop, first_feature)
    if not found:
        return b"", first_feature
    try:
        return encode_value(found), first_feature
    except TypeError as error:
        raise Bypass(str(error)) from None


def request_fields(request: Request) -> dict[str, Value]:
    """Fields of the namespace that belong to the request beside its salt: its adapter's weights, beyond their path.

    Raises:
        Bypass: the adapter's weights cannot be known.
    """
    fields: dict[str, Value] = {}
    adapter = request.lora_request
    if adapter is not None:
        if getattr(adapter, "load_inplace", False):
            raise Bypass(f"the adapter {adapter.lora_name} is replaced while it is in use")
        digest = _adapter_fingerprint((adapter.lora_int_id, adapter.lora_path))
        if digest is None:
            raise Bypass(f"the adapter's files at {adapter.lora_path} cannot be read")
        fields["adapter"] = (adapter.lora_name, adapter.lora_path, digest)
    return fields


@functools.lru_cache(maxsize=256)
def _adapter_fingerprint(id_and_path: tuple[int, str]) -> str | None:
    """Once per id: vLLM, too, keeps the adapter that it has loaded under an id."""
    return fingerprint_weights(id_and_path[1])
