"""From what an engine registers to a layer group: which format it is, decided by facts or refused, never guessed."""

from __future__ import annotations

from collections.abc import Sequence

from lmcache.errors import LayoutError
from lmcache.layout.canonical import canonical_planes
from lmcache.layout.declared import CANONICAL, Declared, Part, Tensors
from lmcache.layout.formats import FORMATS, INDEXER_SCALE_BYTES, INDEXER_VALUE_BYTES, VLLM, Format
from lmcache.layout.planes import Description, LayerGroup, Plane
from lmcache.layout.tensors import TensorSpec, distinct, raw_planes

_LISTS_MAX = 8
"""Longest tuple of one layer's planes."""

Rows = list[list[TensorSpec]]
"""Tensors of each layer."""


def layer_group(parts: Sequence[Part]) -> LayerGroup:
    """The layer group of ``parts``, which share one list of block ids, in that order.

    Raises:
        LayoutError: a tensor is not understood, or the parts do not belong together; the sentence shows the tensor.
    """
    if not parts:
        raise LayoutError("the engine registered no KV tensor")
    first = parts[0].declared
    for part in parts:
        same = (part.declared.num_blocks, part.declared.block_tokens) == (first.num_blocks, first.block_tokens)
        if not same or (part.declared.kind == "state") != (first.kind == "state"):
            raise LayoutError("layers of one group have blocks of different kinds")
    planes: list[Plane] = []
    descriptions = []
    for part in parts:
        more, description = _part(part)
        planes += more
        descriptions.append(description)
    return LayerGroup(tuple(planes), first.num_blocks, first.block_tokens, tuple(descriptions), first.kind == "state")


def find_format(declared: Declared, tensors: Tensors) -> tuple[Format, int]:
    """The format of tensors, and how many blocks of theirs are one of the engine's block table.

    Raises:
        LayoutError: none fits, or several do and what is declared does not decide between them.
    """
    candidates = _candidates(declared, tensors)
    example = _flat(tensors)[0]
    if not candidates:
        raise LayoutError(
            f"KV tensor not understood, no format of {declared.engine} has {declared.num_blocks} blocks of "
            f"{declared.block_tokens} tokens, {declared.num_heads} heads of {declared.head_size}: {example}"
        )
    for settle in (_by_order, _by_backend):
        candidates = settle(declared, candidates)
    if len(candidates) > 1:
        rows = [canonical_planes(f, split, _rows(f, tensors), declared) for f, split in candidates]
        if any(row != rows[0] for row in rows):
            names = " or ".join(found.shape for found, _ in candidates)
            raise LayoutError(f"KV tensor not understood, it could be {names}: {example}")
    return candidates[0]


def _part(part: Part) -> tuple[list[Plane], Description]:
    declared, tensors = part.declared, _unique(part.tensors)
    if not _flat(tensors):
        raise LayoutError("the engine registered no KV tensor")
    if declared.form == CANONICAL:
        found, split = find_format(declared, tensors)
        return canonical_planes(found, split, _rows(found, tensors), declared), describe(found, declared, tensors)
    planes = [
        plane for tensor in _flat(tensors) for plane in raw_planes(tensor, declared.num_blocks, declared.block_tokens)
    ]
    candidates = _by_backend(declared, _by_order(declared, _candidates(declared, tensors)))
    return planes, describe(candidates[0][0] if len(candidates) == 1 else None, declared, tensors)


def describe(found: Format | None, declared: Declared, tensors: Tensors) -> Description:
    """Layers in words; ``found`` is None for raw tensors whose shape is no format's."""
    flat = _flat(tensors)
    shape = flat[0].shape
    if found is None:
        words = ["NB" if size == declared.num_blocks else str(size) for size in shape]
        symbols, lengths = f"NL x [{', '.join(words)}]", [len(flat)]
    else:
        symbols, lengths = found.shape, _lengths(tensors)[: len(found.lists)]
    layers = shape[found.axes.index("NL")] if found and "NL" in found.axes else len(_rows(found, tensors))
    is_latent = declared.kind in ("latent", "indexer")
    return Description(
        num_layers=layers,
        num_heads=1 if is_latent else declared.num_heads,
        head_size=shape[-1] if is_latent else declared.head_size,
        dtype=f"torch.{flat[0].dtype}",
        is_mla=is_latent,
        attention_backend=declared.label(found.label if found else ""),
        shape=symbols,
        concrete_shape="".join(f"{length} x " for length in lengths) + str(list(shape)),
        form=declared.form,
    )


def _candidates(declared: Declared, tensors: Tensors) -> list[tuple[Format, int]]:
    found = []
    for known in FORMATS:
        if declared.engine in known.engines and declared.kind == known.kind and _nests(known, tensors):
            splits = {_split(known, tensor, declared) for tensor in _flat(tensors)}
            if len(splits) == 1 and (split := splits.pop()):
                found.append((known, split))
    return found


def _split(known: Format, tensor: TensorSpec, declared: Declared) -> int:
    """Blocks of the tensor that are one of the block table, if it has the format's shape; else 0. More than one where
    an engine cuts its blocks into smaller ones for the kernel (vLLM)."""
    split = 1
    may_split = declared.engine == VLLM and known.axes[0] == "NB" and "NL" not in known.axes
    if may_split and tensor.shape and tensor.shape[0] % declared.num_blocks == 0:
        split = tensor.shape[0] // declared.num_blocks
    if split < 1 or declared.block_tokens % split:
        return 0
    head = None if declared.kind == "latent" else declared.head_size
    if known.lists[-1:] == ("2",) or known.lists[:1] == ("2",):
        head = None if tensor.shape[-1:] == (declared.value_size,) else head
    sizes: dict[str, int | None] = {
        "NL": None,
        "NB": declared.num_blocks * split,
        "BS": declared.block_tokens // split,
        "PBS": declared.num_blocks * declared.block_tokens,
        "NH": declared.num_heads,
        "HS": head,
        "CS": declared.head_size + declared.value_size,
        "132": INDEXER_VALUE_BYTES + INDEXER_SCALE_BYTES,
    }
    if "2" in known.axes and declared.value_size != declared.head_size:
        return 0
    return split if known.fits(tensor.shape, sizes) else 0


def _by_order(declared: Declared, candidates: list[tuple[Format, int]]) -> list[tuple[Format, int]]:
    kept = [(found, split) for found, split in candidates if found.order == declared.order]
    return kept if declared.order and kept else candidates


def _by_backend(declared: Declared, candidates: list[tuple[Format, int]]) -> list[tuple[Format, int]]:
    backend = declared.attention_backend.upper()
    kept = [(found, split) for found, split in candidates if not found.backends or backend in found.backends]
    return kept or candidates


def _nests(known: Format, tensors: Tensors) -> bool:
    lengths = _lengths(tensors)
    if not known.lists:
        return lengths == [1]
    if len(lengths) != len(known.lists):
        return False
    bounds = {"NL": (1, 1 << 16), "NP": (1, _LISTS_MAX), "2": (2, 2)}
    return all(bounds[word][0] <= length <= bounds[word][1] for word, length in zip(known.lists, lengths, strict=True))


def _lengths(tensors: Tensors) -> list[int]:
    """Lengths of the lists, outermost first; nothing if the inner ones differ."""
    inner = {len(row) for row in tensors if not isinstance(row, TensorSpec)}
    is_flat = all(isinstance(row, TensorSpec) for row in tensors)
    if is_flat:
        return [len(tensors)]
    return [len(tensors), inner.pop()] if len(inner) == 1 else []


def _rows(found: Format | None, tensors: Tensors) -> Rows:
    """Tensors layer by layer."""
    rows = [[row] if isinstance(row, TensorSpec) else list(row) for row in tensors]
    if found is not None and found.lists[:1] == ("2",):
        return [list(pair) for pair in zip(*rows, strict=True)]
    return rows


def _flat(tensors: Tensors) -> list[TensorSpec]:
    return [tensor for row in tensors for tensor in ([row] if isinstance(row, TensorSpec) else row)]


def _unique(tensors: Tensors) -> Tensors:
    """Each layer once: layers that share KV register the same memory under several names."""
    if all(isinstance(row, TensorSpec) for row in tensors):
        return distinct(_flat(tensors))
    return tensors
