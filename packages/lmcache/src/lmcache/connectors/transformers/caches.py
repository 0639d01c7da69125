"""KV as transformers keeps it, with room to grow: a DynamicCache whose tensors are written in place.

Stock DynamicCache makes all its tensors anew for every token. Ours lie in buffers of [1, heads, capacity, head_size],
which a verified copy can fill directly, a later request can use again, and a step of generation extends by one row.
Whatever is done to it that one buffer cannot express (several sequences, beams, gradients) falls back to the stock way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from lmcache.errors import LayoutError
from lmcache.layout import LayerGroup, Layout, make_plane

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCK_TOKENS = 16
"""Tokens of one block in the words of a layout; a server's chunk must be a multiple."""

_GROWTH = 1.5


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer's K and V: [1, heads, tokens, size] each, in the model's own order of layers."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this layer."""
        return (self.key_heads * self.key_size + self.value_heads * self.value_size) * int(self.dtype.itemsize)


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a RoomyCache. ``keys`` and ``values`` are the filled part of the two buffers."""

    def __init__(self, shape: LayerShape, capacity_tokens: int) -> None:
        super().__init__()
        self._shape = shape
        self.dtype, self.device = shape.dtype, torch.device("cpu")
        self.is_initialized = True
        self._allocate(capacity_tokens)
        self.set_length(0)

    def _allocate(self, capacity_tokens: int) -> None:
        shape = self._shape
        with torch.inference_mode(False):  # a tensor made inside could not be written to outside
            self.key_room = torch.empty((1, shape.key_heads, capacity_tokens, shape.key_size), dtype=shape.dtype)
            self.value_room = torch.empty((1, shape.value_heads, capacity_tokens, shape.value_size), dtype=shape.dtype)

    @property
    def in_place(self) -> bool:
        """Whether the filled part still is the buffers' beginning."""
        keys, values = self.keys, self.values
        return (
            keys is not None
            and keys.data_ptr() == self.key_room.data_ptr()
            and values.data_ptr() == self.value_room.data_ptr()
            and keys.shape[0] == 1
        )

    def set_length(self, num_tokens: int) -> None:
        """Take the first ``num_tokens`` of the buffers as filled."""
        self.keys = self.key_room[:, :, :num_tokens]
        self.values = self.value_room[:, :, :num_tokens]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the states of new tokens; returns all of K and V."""
        fits = (
            key_states.shape[:2] == self.key_room.shape[:2]
            and key_states.dtype == self.dtype
            and not key_states.requires_grad
        )
        if not fits or not self.in_place:
            if self.get_seq_length() == 0:
                self.is_initialized = False  # begin as the stock layer does, with whatever comes
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        start = self.keys.shape[-2]
        stop = start + key_states.shape[-2]
        if stop > self.key_room.shape[-2]:
            before = self.keys, self.values
            self._allocate(max(stop, int(stop * _GROWTH)))
            self.key_room[:, :, :start], self.value_room[:, :, :start] = before
        self.key_room[:, :, start:stop] = key_states
        self.value_room[:, :, start:stop] = value_states
        self.set_length(stop)
        return self.keys, self.values

    def reset(self) -> None:
        """Forget what is in it; the room stays."""
        self.set_length(0)


class RoomyCache(DynamicCache):  # type: ignore[misc]
    """A DynamicCache for one sequence with room for ``capacity_tokens``; it grows beyond when it must."""

    def __init__(self, shapes: Sequence[LayerShape], capacity_tokens: int) -> None:
        super().__init__()
        self.layers = [RoomyLayer(shape, capacity_tokens) for shape in shapes]
        self.layer_class_to_replicate = None
        self.capacity_tokens = capacity_tokens

    def set_length(self, num_tokens: int) -> None:
        """Take the first ``num_tokens`` of every layer's buffers as filled."""
        for layer in self.layers:
            layer.set_length(num_tokens)


def probe_shapes(model: Any) -> list[LayerShape]:
    """The shapes of a model's KV, asked of the model itself: one forward of one token.

    Raises:
        LayoutError: its cache is not plain attention over all tokens, or not in host memory.
    """
    cache = DynamicCache(config=model.config)
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
    if others:
        raise LayoutError(f"only caches of full attention are understood, this model has {', '.join(sorted(others))}")
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=model.device), past_key_values=cache)
    shapes = []
    for index, layer in enumerate(cache.layers):
        if not layer.is_initialized or layer.get_seq_length() != 1:
            raise LayoutError(f"layer {index} of this model does not keep one entry a token")
        if layer.keys.device.type != "cpu":
            raise LayoutError(f"its KV is on {layer.keys.device}; this build copies host memory only")
        keys, values = layer.keys.shape, layer.values.shape
        if layer.keys.dtype != layer.values.dtype:
            raise LayoutError(f"layer {index} keeps K and V in different types")
        shapes.append(LayerShape(keys[1], keys[3], values[1], values[3], layer.keys.dtype))
    return shapes


def tensors_of(cache: Any, shapes: Sequence[LayerShape], num_tokens: int) -> list[torch.Tensor]:
    """K and V of every layer in turn, each [heads, >= num_tokens, size] with rows of a head one after another.

    Raises:
        LayoutError: this is not one sequence of this model's KV.
    """
    layers = getattr(cache, "layers", ())
    if len(layers) != len(shapes):
        raise LayoutError(f"the cache has {len(layers)} layers, the model {len(shapes)}")
    tensors = []
    for layer, shape in zip(layers, shapes, strict=True):
        sizes = ((shape.key_heads, shape.key_size), (shape.value_heads, shape.value_size))
        for tensor, (heads, size) in zip((layer.keys, layer.values), sizes, strict=True):
            expected = tensor is not None and tensor.dim() == 4 and tensor.dtype == shape.dtype
            if not expected or (tensor.shape[0], tensor.shape[1], tensor.shape[3]) != (1, heads, size):
                raise LayoutError("the cache is not one sequence of this model's KV")
            if tensor.shape[2] < num_tokens or tensor.device.type != "cpu":
                raise LayoutError(f"the cache holds fewer than {num_tokens} tokens in host memory")
            packed = tensor.stride()[2:] == (size, 1)
            tensors.append((tensor if packed else tensor.contiguous()).detach()[0])
    return tensors


def layout_of_tensors(tensors: Sequence[torch.Tensor], num_tokens: int) -> Layout:
    """The layout of the first ``num_tokens`` (a multiple of BLOCK_TOKENS) of what ``tensors_of`` gave, raw: for each
    layer K then V, for each block, for each head BLOCK_TOKENS rows."""
    planes = []
    for tensor in tensors:
        heads, _, size = tensor.shape
        run = BLOCK_TOKENS * size * tensor.element_size()
        step = tensor.stride(0) * tensor.element_size()
        planes.append(make_plane(tensor.data_ptr(), run, [(heads, step)], run))
    return Layout((LayerGroup(tuple(planes), num_tokens // BLOCK_TOKENS, BLOCK_TOKENS),))
