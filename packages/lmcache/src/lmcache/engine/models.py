"""What the engine serves: a model directory, or a small model made on the spot, with the tokenizer that goes with it.

The made model needs no download. Its weights are random but seeded, its tokens are bytes. Queries and keys start larger
than usual: attention is then sharp, so that a single wrong chunk of KV changes what is generated; and it speaks
printable ASCII only, because the rows of its output that stand for anything else are zero.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lmcache.errors import ConfigError

BUILTIN_NAME = "lmcache-demo"
CONTEXT_TOKENS = 16384
_SEED = 20
_EOS = 256
_PRINTABLE = range(0x20, 0x7F)
_OUTPUT_SCALE = 8.0
"""Wide margins between the logits: rounding that differs between two ways to compute the same never decides."""


class Tokenizer(Protocol):
    """Text to token ids and back."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a prompt; ``special``: with what this tokenizer puts in front of every one."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text; what is no valid or not yet complete character comes as U+FFFD."""

    def spell(self, token_id: int) -> str:
        """Text of one token alone, special ones too; U+FFFD in it stands for what is no character by itself."""

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation (``role`` and ``content`` each) that the model is to continue."""


@dataclass(frozen=True)
class Served:
    """A model ready to serve. ``context_tokens`` is the longest sequence it takes."""

    name: str
    model: Any
    tokenizer: Tokenizer
    eos: frozenset[int]
    vocabulary: int
    context_tokens: int


class ByteTokenizer:
    """A token is a byte of UTF-8."""

    def encode(self, text: str, special: bool = True) -> list[int]:  # noqa: ARG002 - there are none
        """Ids of a prompt."""
        return list(text.encode("utf-8", "replace"))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text; the end-of-sequence token has none."""
        return bytes(token for token in token_ids if token < _EOS).decode("utf-8", "replace")

    def spell(self, token_id: int) -> str:
        """Text of one token; the end-of-sequence token has none."""
        return self.decode([token_id])

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation."""
        return self.encode(plain_chat(messages))


class FileTokenizer:
    """The tokenizer of a model directory."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of a prompt."""
        return list(self._tokenizer.encode(text, add_special_tokens=special))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def spell(self, token_id: int) -> str:
        """Text of one token."""
        return str(self._tokenizer.decode([token_id], skip_special_tokens=False))

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation by the tokenizer's own template, where it has one."""
        if not self._tokenizer.chat_template:
            return self.encode(plain_chat(messages))
        text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return self.encode(text, special=False)


def plain_chat(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text, for models without a template of their own."""
    return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "


def builtin() -> Served:
    """The model that is made on the spot: 8 layers of Llama, hidden size 512, 4 KV heads, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_EOS + 1,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=None,
        eos_token_id=_EOS,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8.0)
            elif "v_proj" in name or "o_proj" in name:
                parameter.mul_(4.0)
        rows = model.lm_head.weight
        rows.mul_(_OUTPUT_SCALE)
        rows[[token for token in range(_EOS + 1) if token not in _PRINTABLE]] = 0.0
    return Served(BUILTIN_NAME, model, ByteTokenizer(), frozenset({_EOS}), _EOS + 1, CONTEXT_TOKENS)


def load(folder: str) -> Served:
    """The model in a directory: safetensors weights, config and tokenizer; nothing is fetched, no code of it is run.

    Raises:
        ConfigError: it cannot be served; one sentence.
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"--model {folder}: there is no config.json, so this is no model directory")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype="auto", use_safetensors=True
        ).eval()
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        raise ConfigError(f"--model {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    config = model.config.get_text_config()
    eos = model.generation_config.eos_token_id
    tokens = {eos} if isinstance(eos, int) else set(eos or ())
    if isinstance(tokenizer.eos_token_id, int):
        tokens.add(tokenizer.eos_token_id)
    context = int(getattr(config, "max_position_embeddings", 0) or CONTEXT_TOKENS)
    name = Path(folder).resolve().name
    return Served(name, model, FileTokenizer(tokenizer), frozenset(tokens), int(config.vocab_size), context)
