"""How a vLLM engine keeps its KV: what its configuration says of it, the layout of its tensors, and the words of
``lmcache describe``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmcache.errors import LayoutError
from lmcache.layout import Declared, LayerGroup, Layout, Part, TensorSpec, layer_group
from lmcache.wire.messages import KernelGroup

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

INDEXER_BYTES = 132
"""An entry of DeepSeek's indexer: it comes with latent attention, and is none."""


def declared_groups(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> list[list[tuple[Declared, tuple[str, ...]]]]:
    """For each KV cache group, its layers that are alike, by name, in the order of the layers. From the configuration
    alone, so that the scheduler's side and every rank come to the same.

    Raises:
        LayoutError: sizes that are none.
    """
    found = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        of_layer = getattr(spec, "kv_cache_specs", None) or dict.fromkeys(group.layer_names, spec)
        alike: dict[Declared, list[str]] = {}
        for name in group.layer_names:
            declared = _declared(vllm_config, kv_cache_config, of_layer[name])
            alike.setdefault(declared, []).append(name)
        found.append([(declared, tuple(names)) for declared, names in alike.items()])
    return found


def engine_layout(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor]
) -> Layout:
    """The layout of one rank.

    Raises:
        LayoutError: no tensor, tensors on several devices, or one that is not understood.
    """
    if not kv_caches:
        raise LayoutError("the engine registered no KV tensor")
    if len({tensor.device for tensor in kv_caches.values()}) > 1:
        raise LayoutError("the KV of one rank is on several devices")
    specs = {name: _spec(name, tensor) for name, tensor in kv_caches.items()}
    groups: list[LayerGroup] = []
    known: set[int] = set()
    for alike in declared_groups(vllm_config, kv_cache_config):
        # Of a layer that another rank has (pipeline parallelism) there is no tensor here.
        parts = [
            Part(declared, [specs[name] for name in names if name in specs])
            for declared, names in alike
            if any(name in specs for name in names)
        ]
        if not parts:
            raise LayoutError("a KV cache group has no layer on this rank, which is not supported")
        groups.append(layer_group(parts))
        known.update(specs[name].address for _, names in alike for name in names if name in specs)
    for name, spec in specs.items():
        if spec.address not in known:
            raise LayoutError(f"KV tensor {name} belongs to no KV cache group")
    return Layout(tuple(groups))


def kernel_groups(layout: Layout) -> tuple[KernelGroup, ...]:
    """One entry for each kind of layers, in the layout's order."""
    return tuple(
        KernelGroup(
            num_layers=words.num_layers,
            num_blocks=group.num_blocks,
            block_tokens=group.block_tokens,
            num_heads=words.num_heads,
            head_size=words.head_size,
            dtype=words.dtype,
            is_mla=words.is_mla,
            attention_backend=words.attention_backend,
            shape=words.shape,
            concrete_shape=words.concrete_shape,
        )
        for group in layout.groups
        for words in group.descriptions
    )


def _declared(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, spec: Any) -> Declared:
    from vllm.platforms import current_platform

    is_latent = type(spec).__name__ == "MLAAttentionSpec"
    kind = "attention"
    if is_latent:
        kind = "indexer" if spec.head_size == INDEXER_BYTES else "latent"
    # Since 0.32 a tensor's shape is [blocks, heads, tokens, K|V], whatever its order in memory.
    order = "HND" if not is_latent and getattr(kv_cache_config, "kv_cache_layout", None) else ""
    return Declared(
        engine="vllm",
        attention_backend=attention_backend(vllm_config),
        device=str(current_platform.device_type),
        kind=kind,
        num_blocks=kv_cache_config.num_blocks,
        block_tokens=spec.block_size,
        num_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=int(getattr(spec, "head_size_v", None) or 0),
        dtype=str(spec.dtype).removeprefix("torch."),
        quantization=_quantization(spec),
        order=order,
    )


def _quantization(spec: Any) -> str:
    packed = getattr(spec, "cache_dtype_str", None)
    if packed and "ds_mla" in packed:
        return str(packed)
    mode = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    return {"NONE": "none", "FP8_PER_TENSOR": "per_tensor"}.get(mode, str(mode).lower())


def attention_backend(vllm_config: VllmConfig) -> str:
    """vLLM's name of it; on an accelerator "" unless it was asked for, since only the workers choose one."""
    from vllm.platforms import current_platform

    chosen = getattr(vllm_config.attention_config, "backend", None)
    if chosen is not None:
        return str(getattr(chosen, "name", chosen))
    if current_platform.is_cpu():
        return "CPU_MLA" if vllm_config.model_config.use_mla else "CPU_ATTN"
    return ""


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(
        name, tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size(), tensor.data_ptr(), dtype
    )
