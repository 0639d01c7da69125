"""Which KV of transformers models is interchangeable: everything that changes the bytes for the same tokens is in here.

The weights are told by the tensors in memory, not by the files they came from: what a script did to a model after
loading it (another dtype, merged adapters, edited weights) is then part of its identity, and a model that was never on
a disk has one, too.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
import transformers

from lmcache.connectors.transformers.caches import BLOCK_TOKENS
from lmcache.errors import LayoutError
from lmcache.layout import FORM_VERSION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmcache.connectors.transformers.caches import LayerShape
    from lmcache.keys import Value

SAMPLES = 16
"""Places of a tensor that its fingerprint looks at; each is SAMPLE_ELEMENTS long."""

SAMPLE_ELEMENTS = 16
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

_VOLATILE_CONFIG = ("_name_or_path", "transformers_version")


def engine_fields(model: Any, shapes: Sequence[LayerShape]) -> dict[str, Value]:
    """Named fields of the namespace that all requests to ``model`` share.

    Raises:
        LayoutError: the model has a feature under which the KV of a token depends on more than the tokens before it.
    """
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE_CONFIG}
    rope = str(config.get("rope_parameters") or config.get("rope_scaling") or "")
    if any(f"'{kind}'" in rope for kind in LENGTH_DEPENDENT_ROPE):
        raise LayoutError("its rotary embedding depends on how long the whole sequence is")
    if model.training:
        raise LayoutError("it is in training mode, where what it computes is partly random: call model.eval() first")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise LayoutError("adapters that can be switched on and off are not understood: merge them into the model")
    return {
        "engine": "transformers",
        "engine_version": (str(transformers.__version__), str(torch.__version__)),
        "config": json.dumps(config, sort_keys=True, default=str),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "weights": fingerprint_tensors(model),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "dtype": str(model.dtype),
        "device": str(model.device.type),
        "ranks": (1, 1, 1),
        "layout": (
            FORM_VERSION,
            BLOCK_TOKENS,
            tuple((s.key_heads, s.key_size, s.value_heads, s.value_size, str(s.dtype)) for s in shapes),
        ),
    }


def fingerprint_tensors(model: Any) -> str:
    """Digest (hex) of a model's parameters and buffers: name, dtype, shape and evenly spaced samples of each.

    What it cannot see is an edit that leaves every sample as it was; training touches all of them.
    """
    digest = hashlib.sha256()
    named = [*model.named_parameters(), *model.named_buffers()]
    for name, tensor in sorted(named, key=lambda item: item[0]):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(_samples(tensor))
    return digest.hexdigest()


def _samples(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().reshape(-1)
    last = max(0, flat.numel() - SAMPLE_ELEMENTS)
    starts = sorted({index * last // (SAMPLES - 1) for index in range(SAMPLES)})
    pieces = [flat[start : start + SAMPLE_ELEMENTS] for start in starts]
    return torch.cat(pieces).contiguous().cpu().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
