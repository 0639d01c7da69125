"""How many tokens a GB of KV cache holds, as a cache server's registered engines tell it. 1 GB is 2**30 bytes."""

from __future__ import annotations

from lmcache_cli import api
from lmcache_cli.bench.base import BenchError

GB_BYTES = 1 << 30


def tokens_per_gb(status: api.Status, model: str) -> int:
    """Tokens of ``model`` in one GB, all ranks together.

    Raises:
        BenchError: the server does not know the model, or not its size.
    """
    instances = [meta for meta in status.cache_context_meta.values() if meta.model_name is not None]
    known = sorted({str(meta.model_name) for meta in instances})
    if not known:
        raise BenchError("the LMCache server has no engine registered: give --tokens-per-gb-kvcache")
    if model not in known:
        raise BenchError(
            f"the LMCache server does not know the model {model}, only {', '.join(known)}: give --tokens-per-gb-kvcache"
        )
    for meta in instances:
        layout = meta.kv_cache_layout
        if meta.model_name == model and layout is not None and layout.cache_size_per_token:
            return max(1, GB_BYTES // (layout.cache_size_per_token * (meta.world_size or 1)))
    raise BenchError(f"the LMCache server does not say how big a token of {model} is: give --tokens-per-gb-kvcache")


def volume_tokens(volume_gb: float, tokens_per_gb: int) -> int:
    """Tokens that ``volume_gb`` hold."""
    return int(volume_gb * tokens_per_gb)
