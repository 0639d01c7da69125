"""Kinds of layers of the paper engine (``paper.py``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)

BLOCK = 16
PAGE_BYTES = BLOCK * 2 * 4


@dataclass(frozen=True)
class Full:
    """A KV group whose tokens see all tokens before."""


@dataclass(frozen=True)
class Window:
    """A group whose tokens see the last ``tokens``."""

    tokens: int


@dataclass(frozen=True)
class Local:
    """A group whose tokens see those before in the same stretch of ``tokens`` (chunked local attention)."""

    tokens: int


@dataclass(frozen=True)
class State:
    """A group of recurrent layers. ``has_inner``: its kernels can leave a state inside of a step."""

    has_inner: bool = False


def spec_of(kind: Full | Window | Local | State) -> KVCacheSpec:
    """As vLLM would describe it."""
    if isinstance(kind, State):
        more = {"num_prefill_checkpoint_blocks": 1, "prefill_checkpoint_alignment": 1} if kind.has_inner else {}
        shapes, dtypes = ((BLOCK, 2),), (torch.float32,)
        return MambaSpec(block_size=BLOCK, shapes=shapes, dtypes=dtypes, mamba_cache_mode="align", **more)
    sizes: dict[str, Any] = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    if isinstance(kind, Window):
        return SlidingWindowSpec(**sizes, sliding_window=kind.tokens)
    if isinstance(kind, Local):
        return ChunkedLocalAttentionSpec(**sizes, attention_chunk_size=kind.tokens)
    return FullAttentionSpec(**sizes)


def first_read(kind: Full | Window | Local, position: int) -> int:
    """The token furthest back that a token at ``position`` reads; the tokens after it read no further."""
    if isinstance(kind, Window):
        return max(0, position - kind.tokens + 1)
    return position // kind.tokens * kind.tokens if isinstance(kind, Local) else 0
