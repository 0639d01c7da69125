"""What vLLM's configuration says of a recurrent layer's states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lmcache.layout import Declared

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig


def declared_state(kv_cache_config: KVCacheConfig, spec: Any) -> Declared:
    """Layers of one ``MambaSpec``: a block is a page of bytes, in which the kernels' states lie side by side."""
    from vllm.platforms import current_platform

    inside = [
        (tuple(shape), str(dtype).removeprefix("torch.")) for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
    ]
    return Declared(
        engine="vllm",
        attention_backend=str(getattr(spec.mamba_type, "name", spec.mamba_type)),
        device=str(current_platform.device_type),
        kind="state",
        num_blocks=kv_cache_config.num_blocks,
        block_tokens=spec.block_size,
        num_heads=1,
        head_size=spec.page_size_bytes,
        dtype="int8",
        # What shapes the inside of a page stands here, since no size of an attention layer says it.
        quantization=f"states {inside}, convolution {_convolution_order()}",
    )


def _convolution_order() -> str:
    """In which order the states of convolutions have their two dimensions; vLLM has it from its environment."""
    try:
        from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
    except ImportError:  # a vLLM that knows one order only
        return "SD"
    return "DS" if is_conv_state_dim_first() else "SD"
