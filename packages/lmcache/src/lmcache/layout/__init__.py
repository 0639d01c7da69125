"""Where an engine keeps its KV, as one affine formula; what an extent of the pool holds, in which order.

A *plane* is what one layer (or one part of a layer) has in every block. Its bytes are

    address + block * block_stride + i0 * s0 + i1 * s1 + i2 * s2 + byte        ij < cj, byte < run

with up to three dims (count, stride), outermost first. Canonical: token, head, K|V. Dims that are contiguous with what
is inside them are merged away, so most planes are one run. A *layer group* is planes whose block ids come from one
list, a *layout* the groups of one engine process. The bytes of an *extent* (one chunk of tokens) are

    for each group, for each plane of it, for each block of the chunk in order, for i0, for i1, for i2: the run

- *canonical form* (attention that we understand): a layer is [token][head][K|V][element], latent attention
  [token][element]. It does not depend on the engine's block size or on the physical order of its dimensions.
- *raw form* (a block whose inside we do not know): whole blocks, dims in the order of memory. Block size, dtype and
  whatever else shapes the inside belong to the identity of such a chunk.

Strides are bytes and may be negative; a native table holds them as two's complement in uint64. That a plan built on a
layout cannot leave the engine's memory, and that no two blocks and no two planes of a group share a byte, is
established here, at construction. Groups may share memory with each other: their block ids do not.
"""

from lmcache.layout.declared import CANONICAL, RAW, Declared, Part, transparent_backends
from lmcache.layout.detect import find_format, layer_group
from lmcache.layout.formats import FORMATS, Format
from lmcache.layout.planes import FORM_VERSION, Description, Dim, LayerGroup, Layout, Plane, make_plane
from lmcache.layout.tensors import TensorSpec, make_layout, raw_group

__all__ = [
    "CANONICAL",
    "FORMATS",
    "FORM_VERSION",
    "RAW",
    "Declared",
    "Description",
    "Dim",
    "Format",
    "LayerGroup",
    "Layout",
    "Part",
    "Plane",
    "TensorSpec",
    "find_format",
    "layer_group",
    "make_layout",
    "make_plane",
    "raw_group",
    "transparent_backends",
]
