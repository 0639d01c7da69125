"""How a vLLM engine keeps its KV: what its configuration says of it, the layout of its tensors, and the words of
``lmcache describe``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lmcache.connectors.vllm.backends import (
    ENGINE,
    attention_backend,
    chosen_backend,
    device,
    has_stock_attention,
)
from lmcache.connectors.vllm.state_specs import declared_state
from lmcache.errors import LayoutError
from lmcache.layout import CANONICAL, RAW, Declared, LayerGroup, Layout, Part, TensorSpec, layer_group
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
        of_layer = _specs_by_layer(spec) or dict.fromkeys(group.layer_names, spec)
        alike: dict[Declared, list[str]] = {}
        if not group.layer_names:  # all of them are other ranks' (pipeline parallelism)
            alike[_declared(vllm_config, kv_cache_config, next(iter(of_layer.values()), spec))] = []
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
    _check_stages(vllm_config)
    specs = {name: _spec(name, tensor) for name, tensor in kv_caches.items()}
    groups: list[LayerGroup] = []
    known: set[int] = set()
    of_groups = declared_groups(vllm_config, kv_cache_config)
    for group, alike in zip(kv_cache_config.kv_cache_groups, of_groups, strict=True):
        # Of a layer that another rank has (pipeline parallelism) there is no tensor here.
        here = [(declared, [name for name in names if name in specs]) for declared, names in alike]
        here = [(declared, names) for declared, names in here if names]
        if not here:
            raise LayoutError("a KV cache group has no layer on this rank, which is not supported")
        _check_forms(vllm_config, kv_cache_config, group.kv_cache_spec, here)
        parts = [Part(_as_chosen(vllm_config, declared, names), [specs[n] for n in names]) for declared, names in here]
        groups.append(layer_group(parts))
        known.update(specs[name].address for _, names in alike for name in names if name in specs)
    for name, spec in specs.items():
        if spec.address not in known:
            raise LayoutError(f"KV tensor {name} belongs to no KV cache group")
    return Layout(tuple(groups))


def _check_stages(vllm_config: VllmConfig) -> None:
    """Return if every stage of a pipeline has as many layers as the others.

    Raises:
        LayoutError: the extents of a chunk, one a rank, have one size; the server would turn others away for ever.
    """
    num_stages = vllm_config.parallel_config.pipeline_parallel_size
    if num_stages == 1:
        return
    from vllm.distributed.utils import get_pp_indices

    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    bounds = [get_pp_indices(num_layers, stage, num_stages) for stage in range(num_stages)]
    counts = [stop - start for start, stop in bounds]
    if len(set(counts)) > 1:
        raise LayoutError(
            f"pipeline stages of {' and '.join(map(str, counts))} layers are not supported: all parts of a chunk have "
            "one size; choose a --pipeline-parallel-size that divides the layers"
        )


def _check_forms(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, spec: Any, here: Sequence[tuple[Declared, Sequence[str]]]
) -> None:
    """Return if the scheduler's side names chunks of a group as this rank keeps them: vLLM shows it one layer's spec of
    the group, whose form it takes for that of all. Raw names hold for both forms.

    Raises:
        LayoutError: it may take the group for canonical, and some layers are not.
    """
    examples = {declared.form: names[0] for declared, names in reversed(here)}
    is_split = vllm_config.parallel_config.pipeline_parallel_size > 1  # another rank's first layer is shown
    shown = _declared(vllm_config, kv_cache_config, next(iter(_specs_by_layer(spec).values()), spec)).form
    if len(examples) > 1 and (is_split or shown == CANONICAL):
        raise LayoutError(
            f"KV layers of one group are kept in different forms, {examples[CANONICAL]} element by element and "
            f"{examples[RAW]} in whole blocks, which is not supported"
        )


def _specs_by_layer(spec: Any) -> Mapping[str, Any]:
    """Of a group whose layers have specs of their own; else nothing."""
    return getattr(spec, "kv_cache_specs", None) or {}


def _as_chosen(vllm_config: VllmConfig, declared: Declared, names: Sequence[str]) -> Declared:
    """With the backend that this worker's layers have, where the form stands on it."""
    if declared.form != CANONICAL:
        return declared
    return replace(declared, attention_backend=chosen_backend(vllm_config, names, declared.attention_backend))


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
    if type(spec).__name__ == "MambaSpec":
        return declared_state(kv_cache_config, spec)
    is_latent = type(spec).__name__ == "MLAAttentionSpec"
    kind = "attention"
    if is_latent:
        kind = "indexer" if spec.head_size == INDEXER_BYTES else "latent"
    # Since 0.32 a tensor's shape is [blocks, heads, tokens, K|V], whatever its order in memory.
    order = "HND" if not is_latent and getattr(kv_cache_config, "kv_cache_layout", None) else ""
    return Declared(
        engine=ENGINE,
        attention_backend=attention_backend(vllm_config, spec),
        device=device(),
        kind=kind,
        num_blocks=kv_cache_config.num_blocks,
        block_tokens=spec.block_size,
        num_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=int(getattr(spec, "head_size_v", None) or 0),
        dtype=str(spec.dtype).removeprefix("torch."),
        quantization=_quantization(spec),
        is_dense=_is_dense(vllm_config, spec),
        order=order,
    )


def _is_dense(vllm_config: VllmConfig, spec: Any) -> bool | None:
    """What the spec says of a block's inside.

    The backend that a worker chose has published its packing in the spec before vLLM plans the memory: slots that are
    not heads, bytes of a cell, tokens of a cell. None of them: a block is [heads, tokens, K|V].
    """
    if not hasattr(spec, "state_content_bytes"):  # before vLLM 0.32
        return None
    if spec.num_head_slots is not None or spec.state_content_bytes is not None or spec.tokens_per_state != 1:
        return False
    if getattr(getattr(spec, "cache_role", None), "name", "") == "INDEXER":
        # Its spec says nothing of the scales: 132 bytes of a token are DeepSeek's, in an order that we know.
        is_deepseeks = spec.head_size == INDEXER_BYTES and str(spec.dtype) == "torch.uint8"
        return None if is_deepseeks else False
    is_plain = type(spec).__name__ in ("FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec")
    return True if is_plain and has_stock_attention(vllm_config) else None


def _quantization(spec: Any) -> str:
    packed = getattr(spec, "cache_dtype_str", None)
    if packed and "ds_mla" in packed:
        return str(packed)
    mode = getattr(getattr(spec, "kv_quant_mode", None), "name", "NONE")
    return {"NONE": "none", "FP8_PER_TENSOR": "per_tensor"}.get(mode, str(mode).lower())


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorSpec(
        name, tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size(), tensor.data_ptr(), dtype
    )
