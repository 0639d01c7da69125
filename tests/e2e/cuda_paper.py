"""KV of a CUDA engine as vLLM plans, allocates and writes it, in host memory; see ``test_forms.py``."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from vllm import _custom_ops
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum
from vllm.v1.attention.backend import AttentionBackend, AttentionType
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend, FlexAttentionImpl
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend, TritonMLAImpl
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config, get_kv_cache_configs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, MLAAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache, customize_attention_spec

from lmcache.connectors.vllm.identity import engine_fields
from lmcache.connectors.vllm.tensors import engine_layout
from lmcache.keys import namespace
from lmcache.layout import Layout

HEADS, SIZE, LATENT, NUM_BLOCKS = 2, 16, 48, 12

_OPS = torch.library.Library("_C_cache_ops", "FRAGMENT")


def _put(rows: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Row i into token ``slots[i]`` of a cache [blocks, tokens, ...], by its strides."""
    tokens = cache.shape[1]
    cache[slots // tokens, slots % tokens] = rows


def define_kernels() -> None:
    """vLLM's two cache kernels of CUDA: a token's K and V, or its latent entry, go where its slot is."""
    _OPS.define(
        "reshape_and_cache_flash(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, "
        "Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale) -> ()"
    )
    _OPS.define(
        "concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor(a!) kv_cache, Tensor slot_mapping, "
        "str kv_cache_dtype, Tensor scale) -> ()"
    )

    def attention(
        key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, *_: Any
    ) -> None:
        _put(key, keys, slots)
        _put(value, values, slots)

    def latent(entry: torch.Tensor, rope: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor, *_: Any) -> None:
        _put(torch.cat([entry, rope], -1), cache, slots)

    _OPS.impl("reshape_and_cache_flash", attention, "CPU")
    _OPS.impl("concat_and_cache_mla", latent, "CPU")


def on_platform(monkeypatch: pytest.MonkeyPatch, kind: PlatformEnum) -> None:
    """Let vLLM's platform say that it is another; ROCm calls its devices cuda."""
    monkeypatch.setattr(type(current_platform), "_enum", kind)
    monkeypatch.setattr(type(current_platform), "device_type", "cuda")
    monkeypatch.setattr(type(current_platform), "device_name", kind.name.lower(), raising=False)


class Layer(AttentionLayerBase):
    """An attention layer, as far as its backend goes."""

    def __init__(self, backend: type[AttentionBackend]) -> None:
        self._backend = backend

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self._backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec | None:
        raise NotImplementedError


class Kept:
    """KV of one engine as vLLM plans and allocates it, and our layout of it."""

    def __init__(
        self,
        config: VllmConfig,
        specs: dict[str, KVCacheSpec],
        backends: dict[str, type[AttentionBackend]],
        order: str,
        kernel_tokens: int,
        *beside: dict[str, KVCacheSpec],
    ) -> None:
        """``beside``: specs of the other stages of a pipeline."""
        self.config = copy.copy(config)
        self.config.cache_config = copy.copy(config.cache_config)
        self.config.compilation_config = copy.copy(config.compilation_config)
        self.config.cache_config.kv_cache_layout = order
        self.config.cache_config.num_gpu_blocks_override = NUM_BLOCKS
        self.config.compilation_config.static_forward_context = {name: Layer(backends[name]) for name in backends}
        specs = {name: customize_attention_spec(backends[name], spec) for name, spec in specs.items()}
        self.plan = get_kv_cache_configs(self.config, [specs, *beside], [1 << 24] * (1 + len(beside)))[0]
        self.plan.kv_cache_layout = order
        self.block_tokens = next(iter(specs.values())).block_size
        self.kernel_tokens = kernel_tokens
        sizes = [kernel_tokens] * len(self.plan.kv_cache_groups)
        self.caches = allocate_kv_cache(self.plan, torch.device("cpu"), KVCacheLayout[order], sizes)

    @property
    def layout(self) -> Layout:
        """Ours, as the worker finds it."""
        return engine_layout(self.config, self.plan, self.caches)

    def names(self) -> bytes:
        """What the scheduler's side, which is given vLLM's own short form of the plan, makes of it."""
        short = generate_scheduler_kv_cache_config([self.plan])
        short.kv_cache_layout = self.plan.kv_cache_layout
        return namespace({"layout": engine_fields(self.config, short)["layout"]})

    def slots(self, table: Sequence[int]) -> torch.Tensor:
        """Of the tokens of a chunk that lies in these blocks: kernels count in their own, smaller blocks."""
        per_block = self.block_tokens // self.kernel_tokens
        cut = [block * per_block + piece for block in table for piece in range(per_block)]
        return torch.tensor(
            [block * self.kernel_tokens + token for block in cut for token in range(self.kernel_tokens)]
        )


def attention_spec(block_tokens: int, **more: Any) -> FullAttentionSpec:
    """Of a layer with heads."""
    facts = {"num_kv_heads": HEADS, "head_size": SIZE, "dtype": torch.float16, **more}
    return FullAttentionSpec(block_size=block_tokens, **facts)


def latent_spec(block_tokens: int, **more: Any) -> MLAAttentionSpec:
    """Of a layer of latent attention."""
    facts = {"num_kv_heads": 1, "head_size": LATENT, "dtype": torch.float16, "cache_dtype_str": "auto", **more}
    return MLAAttentionSpec(block_size=block_tokens, **facts)


def write(kept: Kept, name: str, truth: torch.Tensor, table: Sequence[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let vLLM's backend write the tokens of ``truth`` [tokens, heads, K and V] into blocks of a layer."""
    backend, cache = kept.config.compilation_config.static_forward_context[name].get_attn_backend(), kept.caches[name]
    scale = torch.ones(1)
    if backend is TritonMLABackend:
        entry, rope = truth[:, 0, : LATENT - SIZE], truth[:, :, LATENT - SIZE : LATENT]
        impl: Any = object.__new__(TritonMLAImpl)
        impl.do_kv_cache_update(entry, rope, cache.squeeze(1), kept.slots(table), "auto", scale)
        return
    monkeypatch.setattr(flash_attn, "reshape_and_cache_flash", _custom_ops.reshape_and_cache_flash, raising=False)
    impl = object.__new__({FlashAttentionBackend: FlashAttentionImpl, FlexAttentionBackend: FlexAttentionImpl}[backend])
    impl.attn_type, impl.head_size, impl.kv_cache_dtype = AttentionType.DECODER, SIZE, "auto"
    layer = torch.nn.Module()
    layer._k_scale = layer._v_scale = scale
    impl.do_kv_cache_update(layer, truth[..., :SIZE], truth[..., SIZE:], cache, kept.slots(table))


def stages(config: VllmConfig, *specs: dict[str, KVCacheSpec], num_layers: int = 2) -> list[Kept]:
    """The ranks of a pipeline of a model that has so many layers."""
    config = copy.copy(config)
    config.parallel_config = copy.copy(config.parallel_config)
    config.parallel_config.pipeline_parallel_size = len(specs)
    config.model_config = copy.copy(config.model_config)
    config.model_config.model_arch_config = dataclasses.replace(
        config.model_config.model_arch_config, total_num_hidden_layers=num_layers
    )
    ranks = []
    for number, own in enumerate(specs):
        others = [more for other, more in enumerate(specs) if other != number]
        backends = dict.fromkeys((name for one in specs for name in one), FlashAttentionBackend)
        ranks.append(Kept(config, own, backends, "LBNHC", 16, *others))
    return ranks
