"""Everything that changes KV bytes changes the key: one negative test a field, on vLLM's own configuration and
requests."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm
from conftest import prompt
from models import make_model
from safetensors.torch import load_file, save_file
from vllm import EngineArgs, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request

from lmcache.connectors.vllm.groups import Group, Groups
from lmcache.connectors.vllm.identity import Bypass, engine_fields
from lmcache.connectors.vllm.tracker import KeyChain
from lmcache.errors import LayoutError
from lmcache.keys import namespace

SPEC = {"block_size": 128, "num_kv_heads": 2, "head_size": 64, "dtype": torch.float32}
STATES: dict[str, Any] = {"block_size": 128, "shapes": ((8, 8),), "dtypes": (torch.float32,)}


def kv_config(layers: tuple[str, ...] = ("a", "b"), **spec: Any) -> KVCacheConfig:
    """One group of full attention."""
    groups = [KVCacheGroupSpec(list(layers), FullAttentionSpec(**{**SPEC, **spec}))]
    return KVCacheConfig(num_blocks=16, kv_cache_tensors=[], kv_cache_groups=groups, kv_cache_layout="LBHNC")


def digest(model: Path, kv: KVCacheConfig | None = None, **arguments: Any) -> bytes:
    """Namespace of an engine that would be started so."""
    settings = {"dtype": "float32", "max_model_len": 4096, **arguments}
    config = EngineArgs(model=str(model), **settings).create_engine_config()
    return namespace(engine_fields(config, kv or kv_config()))


@pytest.fixture(scope="module")
def reference(tiny: Path) -> bytes:
    """The namespace that nothing below may share."""
    return digest(tiny)


def edit_config(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50000.0
    (model / "config.json").write_text(json.dumps(config))


def edit_one_tensor(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"] += 0.001
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def test_the_same_engine_is_the_same_wherever_its_files_lie(tiny: Path, reference: bytes, tmp_path: Path) -> None:
    assert digest(tiny) == reference
    assert digest(shutil.copytree(tiny, tmp_path / "moved")) == reference


@pytest.mark.parametrize("edit", [edit_config, edit_one_tensor])
def test_files_that_differ_are_another_model(
    tiny: Path, reference: bytes, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "model")
    edit(copy)
    assert digest(copy) != reference


@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "bfloat16"},
        {"kv_cache_dtype": "fp8"},
        {"kv_cache_dtype_skip_layers": ["1"]},
        {"hf_overrides": {"rope_theta": 50000.0}},
        {"load_format": "dummy"},
        {"load_format": "dummy", "seed": 7},
        {"tensor_parallel_size": 2},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
    ],
    ids=str,
)
def test_settings_that_differ_are_another_engine(tiny: Path, reference: bytes, arguments: dict[str, Any]) -> None:
    assert digest(tiny, **arguments) != reference


def test_a_rope_that_depends_on_the_context_length_tells_engines_of_different_lengths_apart(tiny: Path) -> None:
    dynamic = {"hf_overrides": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}}
    assert digest(tiny, **dynamic) != digest(tiny, **dynamic, max_model_len=2048)
    assert digest(tiny) == digest(tiny, max_model_len=2048)


@pytest.mark.parametrize(
    "kv",
    [
        kv_config(block_size=64),
        kv_config(num_kv_heads=4),
        kv_config(head_size=32),
        kv_config(dtype=torch.bfloat16),
        kv_config(num_head_slots=2, state_content_bytes=512),
        kv_config(layers=("a", "b", "c")),
        dataclasses.replace(kv_config(), kv_cache_layout="BLHNC"),
    ],
)
def test_layouts_that_differ_are_another_engine(tiny: Path, reference: bytes, kv: KVCacheConfig) -> None:
    assert digest(tiny, kv) != reference


def test_another_vllm_is_another_engine(tiny: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.9")
    assert digest(tiny) != reference


def test_the_instruction_set_that_packs_blocks_counts(
    tiny: Path, reference: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.attention.backends import cpu_attn

    monkeypatch.setattr(cpu_attn, "_get_attn_isa", lambda *_: "another")
    assert digest(tiny) != reference


def windowed_config(window: int, *more: KVCacheGroupSpec) -> KVCacheConfig:
    """A group of full attention and one of a sliding window."""
    kv = kv_config()
    group = KVCacheGroupSpec(["c"], SlidingWindowSpec(**SPEC, sliding_window=window))
    return dataclasses.replace(kv, kv_cache_groups=[*kv.kv_cache_groups, group, *more])


def test_every_kv_group_counts(tiny: Path, reference: bytes) -> None:
    kinds = [windowed_config(512), windowed_config(256), kv_config(layers=("a", "b", "c"))]
    kinds.append(dataclasses.replace(kinds[0], kv_cache_groups=kinds[0].kv_cache_groups[::-1]))
    assert len({reference, *(digest(tiny, kv) for kv in kinds)}) == 5


def test_what_a_request_s_tables_are_is_read_from_the_specs() -> None:
    groups = Groups.of(windowed_config(512))
    assert groups == Groups((Group(128), Group(128, 512)))
    assert (groups.are_plain, groups.are_windowed) == (False, True)
    assert Groups.of(kv_config()).are_plain
    chunked = KVCacheGroupSpec(["d"], ChunkedLocalAttentionSpec(**SPEC, attention_chunk_size=256))
    assert Groups.of(windowed_config(512, chunked)).kinds[-1] == Group(128, 256)
    recurrent = KVCacheGroupSpec(["d"], MambaSpec(**STATES, mamba_cache_mode="align"))
    assert Groups.of(windowed_config(512, recurrent)).have_states
    groups.check_chunk(256)
    with pytest.raises(LayoutError, match="--chunk-size 256"):
        groups.check_chunk(200)


def test_a_load_writes_no_block_that_the_engine_has_already_or_that_vllm_has_taken() -> None:
    groups = Groups((Group(128), Group(64, 100)))
    tables = [[11, 12, 13, 14], [0, 0, 0, 0, 0, 26, 27, 28]]
    assert groups.num_whole_chunks(tables, 256) == 2
    assert groups.row(tables, 1, 256) == [13, 14, -1, 26, 27, 28]
    assert groups.row(tables, 0, 256, start=128) == [-1, 12, -1, -1, -1, -1]
    assert groups.row(tables, 1, 256, start=384, stop=449) == [-1, 14, -1, -1, 27, 28]
    assert groups.windowed_blocks([13, 14, 25, 26, 27, 28], 256) == [25, 26, 27, 28]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        (MambaSpec(**STATES), "--enable-prefix-caching"),
        (MambaSpec(**STATES, mamba_cache_mode="all"), 'mode "all"'),
        (FullAttentionSpec(**SPEC, non_causal=True), "later tokens"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_kinds_of_kv_that_are_not_understood_are_refused(spec: KVCacheSpec, why: str) -> None:
    with pytest.raises(LayoutError, match=why):
        Groups.of(windowed_config(512, KVCacheGroupSpec(["d"], spec)))


def test_canonical_chunks_do_not_depend_on_block_size_or_physical_order(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator whose kernels read a block element by element; the machine's own platform stands in for it."""
    config = EngineArgs(model=str(tiny), dtype="float32", max_model_len=4096).create_engine_config()
    monkeypatch.setattr(type(current_platform), "_enum", PlatformEnum.CUDA)
    monkeypatch.setattr(type(current_platform), "device_name", "cuda", raising=False)

    def layout(kv: KVCacheConfig) -> bytes:
        return namespace({"layout": engine_fields(config, kv)["layout"]})

    same = [
        kv_config(),
        kv_config(block_size=16),
        dataclasses.replace(kv_config(), kv_cache_layout="BLHNC"),
        dataclasses.replace(kv_config(), num_blocks=99),
    ]
    assert len({layout(kv) for kv in same}) == 1
    others = [kv_config(num_kv_heads=4), kv_config(dtype=torch.bfloat16), kv_config(layers=("a",)), kv_config()]
    assert len({layout(kv) for kv in others}) == len(others)
    config.attention_config.backend = AttentionBackendEnum.HPC_ATTN  # not known to us: whole blocks
    assert layout(kv_config()) != layout(kv_config(block_size=16))


# --- requests ---------------------------------------------------------------------------------------------------------


def request(tokens: list[int] | None, **more: Any) -> Request:
    """A request as vLLM's scheduler sees it."""
    return Request("r", tokens, SamplingParams(max_tokens=4), None, **more)


def image(identifier: str, offset: int = 10) -> MultiModalFeatureSpec:
    """A picture of 64 tokens."""
    place = PlaceholderRange(offset=offset, length=64)
    return MultiModalFeatureSpec(data=None, modality="image", identifier=identifier, mm_position=place)


def last_key(of: Request, chunk_tokens: int = 256) -> bytes:
    """Key of the last whole chunk."""
    return KeyChain(of, namespace({"engine": "test"}), chunk_tokens).upto(of.num_tokens)[-1]


def adapter_at(folder: Path, value: float, number: int) -> LoRARequest:
    """An adapter at one path whose weights are ``value``; a new ``number`` = vLLM loads it anew."""
    folder.mkdir(exist_ok=True)
    save_file({"w": torch.full((64,), value)}, folder / "adapter_model.safetensors")
    return LoRARequest("adapter", number, str(folder))


def test_requests_that_differ_beside_their_tokens_have_other_keys(tmp_path: Path) -> None:
    tokens = prompt(1, 600)
    embeds = torch.zeros(600, 8)
    variants = {
        "plain": request(tokens),
        "another token": request([3, *tokens[1:]]),
        "salt": request(tokens, cache_salt="a"),
        "another salt": request(tokens, cache_salt="b"),
        "image": request(tokens, mm_features=[image("one")]),
        "another image": request(tokens, mm_features=[image("two")]),
        "image elsewhere": request(tokens, mm_features=[image("one", 20)]),
        "adapter": request(tokens, lora_request=adapter_at(tmp_path / "adapter", 1.0, 1)),
        "embeds": request(None, prompt_embeds=embeds),
        "other embeds": request(None, prompt_embeds=embeds + 1),
    }
    keys = {name: last_key(variant) for name, variant in variants.items()}
    keys["adapter retrained at the same path"] = last_key(
        request(tokens, lora_request=adapter_at(tmp_path / "adapter", 2.0, 2))
    )
    keys["another chunk size"] = last_key(request(tokens), 128)
    assert len(set(keys.values())) == len(keys)
    assert last_key(request(tokens)) == keys["plain"]


def test_a_prefix_has_the_keys_of_the_longer_prompt_and_generated_tokens_extend_them() -> None:
    tokens = prompt(2, 1024)
    whole = KeyChain(request(tokens), namespace({}), 256).upto(1024)
    shorter = request(tokens[:700])
    chain = KeyChain(shorter, namespace({}), 256)
    assert chain.upto(700) == whole[:2]
    shorter.append_output_token_ids(tokens[700:])
    assert chain.upto(1024) == whole


def test_an_adapter_without_files_is_not_cached() -> None:
    with pytest.raises(Bypass, match="cannot be read"):
        last_key(request(prompt(3, 300), lora_request=LoRARequest("gone", 9, "/nowhere")))


def test_weights_that_cannot_be_read_are_shared_with_nobody(tiny: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert digest(bare) != digest(bare)


def test_models_made_with_another_seed_differ(tmp_path: Path, reference: bytes) -> None:
    assert digest(make_model(tmp_path / "other", "tiny-llama", seed=5)) != reference
