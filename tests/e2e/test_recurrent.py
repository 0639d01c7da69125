"""Models with recurrent layers, of which vLLM has a state here and there, and with attention in stretches: what is
loaded continues as if it had been computed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHUNK, prompt, wait_for
from engine import Engine, Server

STEP = {"enable_prefix_caching": True, "max_num_batched_tokens": 512, "max_model_len": 2048}
STRETCH = 384
LENGTHS = (1500, 900, 700, 513, 385)


def make_mixed(folder: Path, tokenizer: Path, is_recurrent: bool) -> Path:
    """A random model of four layers: Qwen3-Next, three gated delta nets and one of attention, or Llama 4, three of
    attention in stretches and one that sees all."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig, Qwen3NextConfig, Qwen3NextForCausalLM

    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    if is_recurrent:
        linear = {"num_key_heads": 2, "num_value_heads": 4, "key_head_dim": 64, "value_head_dim": 64}
        sizes |= {f"linear_{name}": size for name, size in linear.items()}
        sizes |= {"num_experts": 2, "num_experts_per_tok": 1, "mlp_only_layers": [0, 1, 2]}  # vLLM wants an expert
        sizes |= {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
        kinds = ["linear_attention"] * 3 + ["full_attention"]
        model: Any = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, layer_types=kinds))
    else:
        heads = {"attention_chunk_size": STRETCH, "no_rope_layers": [1, 1, 1, 0]}
        dense = {"moe_layers": [], "interleave_moe_layer_step": 8, "num_local_experts": 2, "intermediate_size_mlp": 512}
        model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **heads, **dense))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("q_proj", "k_proj", "in_proj_qkv")):
                parameter.mul_(8.0)
            elif any(part in name for part in ("v_proj", "o_proj", "out_proj", "in_proj")):
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("name", ["tiny-qwen3-next", "tiny-llama4"])
def test_what_is_loaded_continues_as_if_it_had_been_computed(name: str, models: Path, tiny: Path, logs: Path) -> None:
    """Gated delta nets run on a CPU in bfloat16 only; steps end alike in a cold run and behind a hit, at states."""
    is_recurrent = name == "tiny-qwen3-next"
    folder = make_mixed(models / name, tiny, is_recurrent)
    prompts = [prompt(700 + index, length) for index, length in enumerate(LENGTHS)]
    # A state is kept at the end of the last block before the last token, which is one of a chunk here.
    hits = [(length - is_recurrent) // CHUNK * CHUNK for length in LENGTHS]
    settings = {**STEP, "dtype": "bfloat16" if is_recurrent else "float32"}
    with Engine(folder, logs, **settings) as engine:
        expected = [engine.generate([entry])["tokens"][0] for entry in prompts]
        # A talk that goes on from an answer, whose beginning is held.
        talks = [[*entry, *tokens] for entry, tokens in zip(prompts, expected, strict=True)]
        assert engine.call("reset")["reset"]
        further = [engine.generate([talk])["tokens"][0] for talk in talks]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "the prompts matter"
    with Server(logs) as server:
        for _ in range(2):  # the second engine finds what the first one has left
            with Engine(folder, logs, server.port, **settings) as engine:
                for _ in range(10):
                    answers = [engine.generate([entry]) for entry in prompts]
                    assert [answer["tokens"][0] for answer in answers] == expected
                    assert engine.call("reset")["reset"]
                    if [answer["cached"][0] for answer in answers] == hits:
                        break
                assert [answer["cached"][0] for answer in answers] == hits
                assert engine.generate(prompts)["tokens"] == expected
                assert [engine.generate([talk])["tokens"][0] for talk in talks] == further
                assert engine.call("counters")["failed_chunks"] == 0
        wait_for(lambda: server.status()["active_sessions"] == 0, "all leases and reservations are given back")
