"""From an engine's tensors to a layout: the only place in ``transfer`` that knows torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lmcache.errors import LayoutError
from lmcache.layout import Layout, TensorSpec, make_layout


def layout_of(tensors: Mapping[str, torch.Tensor], num_blocks: int) -> Layout:
    """The layout of KV tensors, by name in layer order.

    Raises:
        LayoutError: no tensor, one that is not in memory this process can address, or one that is not understood.
    """
    if not tensors:
        raise LayoutError("the engine registered no KV tensor")
    for name, tensor in tensors.items():
        if tensor.device.type != "cpu":
            raise LayoutError(f"KV tensor {name} is on {tensor.device}; this build copies host memory only")
    return make_layout([_spec(name, tensor) for name, tensor in tensors.items()], num_blocks)


def _spec(name: str, tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(name, tuple(tensor.shape), tuple(tensor.stride()), tensor.element_size(), tensor.data_ptr())
