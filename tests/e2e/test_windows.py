"""Models whose layers see a window only: vLLM gives blocks back while a request runs, and keeps several block tables
where other layers see everything. The same promise for each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import expected_hit, prompt, wait_for
from engine import Engine, Server

WINDOW = 384
ROUNDS_MAX = 10
PRESSED = {"enable_prefix_caching": True, "num_gpu_blocks_override": 60, "max_num_batched_tokens": 512}


def make_windowed(folder: Path, tokenizer: Path, is_hybrid: bool) -> Path:
    """A random model: Gemma 3 with three windowed layers and one that sees all, or Mistral with windows throughout."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    if (folder / "config.json").exists():
        return folder
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "sliding_window": WINDOW,
    }
    if is_hybrid:
        kinds = ["sliding_attention"] * 3 + ["full_attention"]
        more = {"num_hidden_layers": 4, "layer_types": kinds, "query_pre_attn_scalar": 64}
        model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **more))
    else:
        model = MistralForCausalLM(MistralConfig(**sizes, num_hidden_layers=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8.0)
            elif "v_proj" in name or "o_proj" in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    for file in tokenizer.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize("name", ["tiny-mistral-window", "tiny-gemma3-hybrid"])
def test_a_windowed_model_answers_alike(name: str, models: Path, tiny: Path, server: Server, logs: Path) -> None:
    folder = make_windowed(models / name, tiny, is_hybrid="hybrid" in name)
    shared = prompt(500, 900)
    prompts = [prompt(501, 1500), *(shared + prompt(502 + index, 150 + 70 * index) for index in range(4))]
    with Engine(folder, logs, enable_prefix_caching=False) as engine:
        expected = [engine.generate([entry])["tokens"][0] for entry in prompts]
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "the prompts matter"
    hits = [expected_hit(len(entry)) for entry in prompts]
    with Engine(folder, logs, server.port, max_model_len=2048, **PRESSED) as engine:
        for _ in range(ROUNDS_MAX):
            answers = [engine.generate([entry]) for entry in prompts]
            assert [answer["tokens"][0] for answer in answers] == expected
            # vLLM's own cache is emptied, so that the next round's hits are ours; a store may have been dropped.
            assert engine.call("reset")["reset"]
            if [answer["cached"][0] for answer in answers] == hits:
                break
        assert [answer["cached"][0] for answer in answers] == hits
        for _ in range(2):
            assert engine.generate(prompts)["tokens"] == expected
        assert engine.call("counters")["failed_chunks"] == 0
    wait_for(lambda: server.status()["active_sessions"] == 0, "all leases and reservations are given back")
