"""Which form the chunks of a CUDA engine have, on vLLM's own planning, views and cache writes, in host memory.

vLLM's machine is a CPU here, so its platform says that it is another; kernels that only a GPU has are defined for the
CPU as vLLM documents them. What vLLM does in Python is vLLM's: specs, memory plans, views, and how a backend takes a
view apart before it writes.
"""

from __future__ import annotations

import dataclasses
import os
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from cuda_paper import (
    HEADS,
    LATENT,
    SIZE,
    Kept,
    Layer,
    attention_spec,
    define_kernels,
    latent_spec,
    on_platform,
    stages,
    write,
)
from vllm import EngineArgs
from vllm.config import VllmConfig
from vllm.platforms.interface import PlatformEnum
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.flex_attention import FlexAttentionBackend
from vllm.v1.attention.backends.hpc_attn import HpcAttentionBackend
from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerBackend
from vllm.v1.attention.backends.mla.triton_mla import TritonMLABackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend
from vllm.v1.attention.backends.turboquant_attn import TurboQuantAttentionBackend
from vllm.v1.kv_cache_interface import (
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVQuantMode,
    SlidingWindowSpec,
    SparseCacheRole,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from lmcache.connectors.vllm.identity import engine_fields
from lmcache.connectors.vllm.tensors import declared_groups
from lmcache.errors import LayoutError
from lmcache.keys import namespace
from lmcache.layout import CANONICAL, RAW
from lmcache.transfer.plan import CopyEngine, Plan
from lmcache.transfer.pool_map import PoolMap

CHUNK = 64
LAYERS = ("model.layers.0.attn", "model.layers.1.attn")
POOL_BYTES = 1 << 20


@pytest.fixture(scope="module", autouse=True)
def _gpu_kernels() -> None:
    define_kernels()


@pytest.fixture
def config(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """An engine's configuration, on a machine that says it has CUDA."""
    made = EngineArgs(model=str(tiny), dtype="float16", max_model_len=64).create_engine_config()
    on_platform(monkeypatch, PlatformEnum.CUDA)
    return made


@pytest.fixture(scope="module")
def pool() -> PoolMap:
    fd = os.open("/dev/shm", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, POOL_BYTES)
    return PoolMap(fd, POOL_BYTES)


@pytest.mark.parametrize("is_latent", [False, True], ids=["heads", "latent"])
def test_whatever_block_order_and_backend_vllm_chooses_the_chunk_is_the_same(
    config: VllmConfig, pool: PoolMap, is_latent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody names a backend: the scheduler's side and the worker each find the form by themselves."""
    assert config.attention_config.backend is None
    heads = 1 if is_latent else HEADS
    truth = torch.randn(len(LAYERS), CHUNK, heads, LATENT if is_latent else 2 * SIZE).half()
    expected = truth.numpy().tobytes()
    names, checksums = set(), set()
    for number, (order, block_tokens, kernel_tokens) in enumerate(
        [(order, block, block) for order in KVCacheLayout.__members__ for block in (16, 32, 64)]
        + [("LBNHC", 64, 16), ("LBHNC", 64, 32), ("LBHNC", 32, 16)]
    ):
        backend = TritonMLABackend if is_latent else (FlashAttentionBackend, FlexAttentionBackend)[number % 2]
        spec = latent_spec(block_tokens) if is_latent else attention_spec(block_tokens)
        kept = Kept(config, dict.fromkeys(LAYERS, spec), dict.fromkeys(LAYERS, backend), order, kernel_tokens)
        table = [11, 3, 7, 2, 9][: CHUNK // block_tokens]
        for name, tokens in zip(LAYERS, truth, strict=True):
            write(kept, name, tokens, table, monkeypatch)
        names.add(kept.names())
        layout = kept.layout
        copy = CopyEngine(layout)
        checksums.add(copy.store(pool, Plan.of(CHUNK, table, [0], [5]), 1))
        assert {words.form for group in layout.groups for words in group.descriptions} == {CANONICAL}
        assert bytes(pool.buffer[: layout.extent_bytes(CHUNK)]) == expected, (order, block_tokens, kernel_tokens)
    assert len(names) == len(checksums) == 1


def test_an_engine_loads_what_another_one_stored(
    config: VllmConfig, pool: PoolMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    truth = torch.randn(len(LAYERS), CHUNK, HEADS, 2 * SIZE).half()
    kinds = [("LBNHC", 16, FlashAttentionBackend), ("BHLNC", 64, FlexAttentionBackend)]
    one, other = (
        Kept(config, dict.fromkeys(LAYERS, attention_spec(block)), dict.fromkeys(LAYERS, backend), order, block)
        for order, block, backend in kinds
    )
    for name, tokens in zip(LAYERS, truth, strict=True):
        write(one, name, tokens, [4, 1, 8, 6], monkeypatch)
    stored = CopyEngine(one.layout).store(pool, Plan.of(CHUNK, [4, 1, 8, 6], [0], [5]), 1)
    checksum = int.from_bytes(stored, "little")
    assert CopyEngine(other.layout).retrieve(pool, Plan.of(CHUNK, [10], [0], [5]), [checksum], 1) == []
    for name, tokens in zip(LAYERS, truth, strict=True):
        key, value = other.caches[name].transpose(1, 2).split(SIZE, dim=-1)  # as its kernels read it
        assert torch.equal(torch.cat([key[10], value[10]], -1), tokens)


def test_a_named_backend_has_the_chunks_of_one_that_vllm_chose(config: VllmConfig) -> None:
    kept = Kept(config, {"a": attention_spec(16)}, {"a": FlashAttentionBackend}, "LBNHC", 16)
    chosen = kept.names()
    kept.config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    assert kept.names() == chosen
    kept.config.attention_config.backend = AttentionBackendEnum.HPC_ATTN  # not known to us: whole blocks
    assert kept.names() != chosen
    kept.config.attention_config.backend = None
    kept.config.attention_config.backend_per_kind = {"full_attention": AttentionBackendEnum.HPC_ATTN}
    assert kept.names() != chosen


def plan_of(spec: KVCacheSpec) -> KVCacheConfig:
    """One layer of it."""
    return KVCacheConfig(8, [], [KVCacheGroupSpec(["a"], spec)], kv_cache_layout="LBNHC")


PACKED = [
    (TritonAttentionBackend, attention_spec(16, dtype=torch.int8, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)),
    (TritonAttentionBackend, attention_spec(16, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TOKEN_HEAD)),
    (TritonMLABackend, latent_spec(16, dtype=torch.int8, kv_quant_mode=KVQuantMode.INT8_PER_TOKEN_HEAD)),
    (
        TurboQuantAttentionBackend,
        attention_spec(16, head_size=128, dtype=torch.uint8, kv_quant_mode=KVQuantMode.TURBOQUANT_4BIT_NC),
    ),
    (FlashAttentionBackend, attention_spec(16, dtype=torch.uint8, kv_quant_mode=KVQuantMode.NVFP4)),
    (FlashAttentionBackend, attention_spec(16, num_head_slots=2, state_content_bytes=HEADS * SIZE * 2)),
    (FlashAttentionBackend, attention_spec(16, tokens_per_state=4)),
    (FlashAttentionBackend, attention_spec(16, tokens_per_state=Fraction(1, 2))),
    (TritonMLABackend, latent_spec(64, dtype=torch.uint8, cache_dtype_str="fp8_ds_mla", state_content_bytes=656)),
    (
        DeepseekV32IndexerBackend,
        latent_spec(64, head_size=132, dtype=torch.uint8, cache_role=SparseCacheRole.INDEXER),
    ),
    (DeepseekV32IndexerBackend, latent_spec(64, head_size=68, dtype=torch.uint8, cache_role=SparseCacheRole.INDEXER)),
]
"""What backends keep beside the elements of a token, as they publish it themselves."""


@pytest.mark.parametrize(("backend", "spec"), PACKED, ids=lambda value: getattr(value, "__name__", ""))
def test_blocks_with_more_in_them_than_elements_are_whole_blocks(
    config: VllmConfig, backend: type[AttentionBackend], spec: KVCacheSpec
) -> None:
    published = backend.customize_spec(spec)
    (((declared, _),),) = declared_groups(config, plan_of(published))
    assert declared.form == RAW
    double = dataclasses.replace(published, block_size=2 * spec.block_size)
    spaces = {namespace(engine_fields(config, plan_of(one))) for one in (published, double)}
    assert len(spaces) == 2


@pytest.mark.parametrize(
    "spec",
    [
        attention_spec(16),
        attention_spec(16, head_size_v=8),
        attention_spec(16, dtype=torch.uint8, kv_quant_mode=KVQuantMode.FP8_PER_TENSOR),
        attention_spec(16, page_size_padded=1 << 16),
        SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float16, sliding_window=64),
        latent_spec(16),
    ],
    ids=["heads", "other values", "eight bits", "padded", "window", "latent"],
)
def test_elements_alone_are_canonical_on_cuda_and_nowhere_else(
    config: VllmConfig, spec: KVCacheSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def form() -> str:
        (((declared, _),),) = declared_groups(config, plan_of(spec))
        return declared.form

    assert form() == CANONICAL
    for kind in (PlatformEnum.ROCM, PlatformEnum.XPU, PlatformEnum.CPU, PlatformEnum.OOT):
        on_platform(monkeypatch, kind)
        assert form() == RAW
    on_platform(monkeypatch, PlatformEnum.ROCM)
    config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    assert form() == RAW
    on_platform(monkeypatch, PlatformEnum.CUDA)
    assert form() == CANONICAL


@pytest.mark.parametrize("architecture", ["MiniMaxM3SparseForCausalLM", "DeepseekV32ForCausalLM", "SomebodysModel"])
def test_a_model_with_attention_of_its_own_is_kept_in_whole_blocks(
    config: VllmConfig, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config.model_config, "_architecture", architecture)
    (((declared, _),),) = declared_groups(config, plan_of(attention_spec(16)))
    assert declared.form == RAW


class Elsewhere(FlashAttentionBackend):
    """A plug-in's, under a name that vLLM knows."""


def test_a_worker_whose_layers_contradict_the_configuration_stores_nothing(config: VllmConfig) -> None:
    kept = Kept(config, {"a": attention_spec(16)}, {"a": FlashAttentionBackend}, "LBNHC", 16)
    layers = kept.config.compilation_config.static_forward_context
    assert kept.layout.groups[0].descriptions[0].attention_backend == "vLLM non-MLA flash attention"
    layers["a"] = Layer(HpcAttentionBackend)
    with pytest.raises(
        LayoutError, match=r"layer a is read by attention backend HPC_ATTN .*; with --attention-backend HPC_ATTN"
    ):
        _ = kept.layout
    layers["a"] = Layer(Elsewhere)
    with pytest.raises(LayoutError, match=r"FLASH_ATTN \(.*Elsewhere\)"):
        _ = kept.layout
    del layers["a"]
    with pytest.raises(LayoutError, match="of KV layer a it cannot be told"):
        _ = kept.layout
    kept.caches["a"] = kept.caches["a"].view(torch.bfloat16)
    layers["a"] = Layer(FlashAttentionBackend)
    with pytest.raises(LayoutError, match="expected elements of float16: a: shape"):
        _ = kept.layout


def test_layers_of_one_group_whose_forms_differ_are_refused_where_the_scheduler_sees_a_canonical_one(
    config: VllmConfig,
) -> None:
    """vLLM gives its scheduler the spec of a group's first layer."""
    index = latent_spec(64, head_size=132, dtype=torch.uint8, cache_role=SparseCacheRole.INDEXER)
    specs = {"a.attn": latent_spec(64), "a.indexer": index}
    backends = {"a.attn": TritonMLABackend, "a.indexer": DeepseekV32IndexerBackend}
    kept = Kept(config, specs, backends, "BLNHC", 64)
    with pytest.raises(LayoutError, match=r"different forms, a\.attn element by element and a\.indexer in whole"):
        _ = kept.layout
    turned = Kept(config, dict(reversed(specs.items())), backends, "BLNHC", 64)
    forms = [words.form for words in turned.layout.groups[0].descriptions]
    assert forms == [RAW, CANONICAL]
    assert turned.names() != Kept(config, dict(reversed(specs.items())), backends, "BLHNC", 64).names()


def test_stages_of_a_pipeline_have_layers_of_their_own_and_extents_of_one_size(config: VllmConfig) -> None:
    first, second = stages(config, {"a": attention_spec(16)}, {"b": attention_spec(16)})
    assert first.layout.extent_bytes(CHUNK) == second.layout.extent_bytes(CHUNK) == CHUNK * HEADS * 2 * SIZE * 2
    with pytest.raises(LayoutError, match="pipeline stages of 2 and 1 layers"):
        _ = stages(config, {"a": attention_spec(16)}, {"b": attention_spec(16)}, num_layers=3)[0].layout


def test_a_stage_without_a_layer_of_a_group_is_refused_and_its_group_is_named_all_the_same(config: VllmConfig) -> None:
    window = SlidingWindowSpec(block_size=16, num_kv_heads=2, head_size=16, dtype=torch.float16, sliding_window=64)
    first, second = stages(config, {"a": attention_spec(16)}, {"b": window})
    assert [len(alike) for alike in declared_groups(first.config, first.plan)] == [1, 1]
    assert first.names() != stages(config, {"a": attention_spec(16)}, {"b": attention_spec(16)})[0].names()
    for rank in (first, second):
        with pytest.raises(LayoutError, match="a KV cache group has no layer on this rank"):
            _ = rank.layout
