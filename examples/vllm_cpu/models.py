"""Small random models that stock vLLM serves, made on the spot: nothing is downloaded.

Random weights are good enough to prove that KV is reused correctly, as long as the output depends on every token of the
prompt. With the usual initialisation it hardly does, so queries and keys start larger: then attention is sharp, and a
single wrong block changes what is generated. The tokenizer is real: BPE, trained on the texts of this repository.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
VOCABULARY = 4096
CONTEXT_TOKENS = 16384
RECIPE = 6  # raise it when the weights are made differently: models that lie around are then made anew

SHAPES: dict[str, dict[str, Any]] = {
    "tiny-llama": {"num_hidden_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "small-llama": {"num_hidden_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4},
    "tiny-deepseek-mla": {
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 512,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
    },
}


def make_model(folder: Path, name: str, seed: int = 0) -> Path:
    """Write model ``name`` of ``SHAPES`` with its tokenizer to ``folder`` and return it; made before = left alone."""
    done = folder / "made.json"
    recipe = {"name": name, "seed": seed, "shape": SHAPES[name], "vocabulary": VOCABULARY, "version": RECIPE}
    if done.exists() and json.loads(done.read_text()) == recipe:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(folder)
    _write_weights(folder, name, seed)
    done.write_text(json.dumps(recipe))
    return folder


def corpus() -> list[str]:
    """Texts of this repository, in an order that does not depend on the machine."""
    files = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), *REPOSITORY.glob("packages/**/*.py")]
    return [path.read_text(encoding="utf-8") for path in sorted(files)]


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "model_max_length": CONTEXT_TOKENS}))


def _write_weights(folder: Path, name: str, seed: int) -> None:
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    common = {
        **SHAPES[name],
        "vocab_size": VOCABULARY,
        "intermediate_size": 2 * SHAPES[name]["hidden_size"],
        "max_position_embeddings": CONTEXT_TOKENS,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    if "mla" in name:
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**common))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if any(part in parameter_name for part in ("q_proj", "k_proj", "kv_a_proj")):
                parameter.mul_(8.0)
            elif any(part in parameter_name for part in ("v_proj", "o_proj", "kv_b_proj")):
                parameter.mul_(4.0)
    model.save_pretrained(folder)


def main() -> None:
    """Make one model by hand."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_model(arguments.folder, arguments.name, arguments.seed))


if __name__ == "__main__":
    main()
