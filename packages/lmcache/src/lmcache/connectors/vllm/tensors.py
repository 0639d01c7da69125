"""How a vLLM engine's KV looks, in the words of ``lmcache describe``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lmcache.wire.messages import KernelGroup

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def kernel_groups(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, kv_caches: Mapping[str, torch.Tensor]
) -> tuple[KernelGroup, ...]:
    """One entry for each distinct tensor shape among the layers, in the order of the layers."""
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    by_shape: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for tensor in kv_caches.values():
        by_shape.setdefault((tuple(tensor.shape), tensor.dtype), []).append(tensor)
    is_mla = bool(vllm_config.model_config.use_mla)
    backend = _backend(vllm_config)
    return tuple(_group(spec, tensors, kv_cache_config.num_blocks, is_mla, backend) for tensors in by_shape.values())


def _group(spec: Any, tensors: list[torch.Tensor], num_blocks: int, is_mla: bool, backend: str) -> KernelGroup:
    shape = tuple(tensors[0].shape)
    return KernelGroup(
        num_layers=len(tensors),
        num_blocks=num_blocks,
        block_tokens=spec.block_size,
        num_heads=int(getattr(spec, "num_kv_heads", 1)),
        head_size=int(getattr(spec, "head_size", shape[-1])),
        dtype=str(tensors[0].dtype),
        is_mla=is_mla,
        attention_backend=backend,
        shape=f"NL x {_symbols(shape, spec, num_blocks, is_mla)}",
        concrete_shape=f"{len(tensors)} x {list(shape)}",
    )


def _symbols(shape: tuple[int, ...], spec: Any, num_blocks: int, is_mla: bool) -> str:
    """Names for the dimensions: [NB, NH, BS, CS] for vLLM's blocks-first tensors with K and V of a head side by
    side."""
    heads, head = getattr(spec, "num_kv_heads", 1), getattr(spec, "head_size", 0)
    known = {num_blocks: "NB", spec.block_size: "BS", heads: "NH", head: "HS", 2 * head: "CS"}
    if len(shape) == 4 and shape[0] == num_blocks:
        return "[NB, 1, BS, HS]" if is_mla else "[NB, NH, BS, CS]"
    return "[" + ", ".join(known.get(size, str(size)) for size in shape) + "]"


def _backend(vllm_config: VllmConfig) -> str:
    from vllm.platforms import current_platform

    kind = "MLA" if vllm_config.model_config.use_mla else "non-MLA"
    chosen = getattr(vllm_config.attention_config, "backend", None)
    name = str(
        getattr(chosen, "name", chosen) or ("CPU attention" if current_platform.is_cpu() else "default attention")
    )
    return f"vLLM {kind} {name}"
