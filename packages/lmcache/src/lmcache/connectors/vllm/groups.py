"""vLLM's KV cache groups: layers whose blocks come from one table of the request, and what vLLM does with that table.

A group of layers with windows keeps the blocks of the last window only: vLLM gives the others back while the request
runs, leaves its null block in their places, and allocates none for what a load would bring outside the window. A window
slides with the request (sliding-window attention) or stands still until the request leaves it (chunked local
attention); which blocks are in it is vLLM's affair in both cases, and all that counts here is that others go.

A group of recurrent layers (Mamba, linear attention) keeps no tokens at all: a block holds the state after the last
token of its place in the table, and only few places have one (``states.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcache.errors import LayoutError
from lmcache.transfer.plan import NOT_WRITTEN

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

NULL_BLOCK = 0
"""vLLM's placeholder in a table; it never holds KV."""

Tables = Sequence[Sequence[int]]
"""A request's block ids, one table a group."""


@dataclass(frozen=True, slots=True)
class Group:
    """What is alike in the layers of a group.

    Attributes:
        block_tokens: tokens of one block.
        window_tokens: None where every block of a request stays until its end.
        is_state: a block holds the state after its last token.
        has_inner_states: the last step of a prefill may leave a state inside of it, beside the one at its end.
        has_drafts: tokens are computed that may be refused; the state is mended after the step that computed them.
    """

    block_tokens: int
    window_tokens: int | None = None
    is_state: bool = False
    has_inner_states: bool = False
    has_drafts: bool = False


@dataclass(frozen=True)
class Groups:
    """The groups of an engine, in vLLM's order."""

    kinds: tuple[Group, ...]

    @classmethod
    def of(cls, kv_cache_config: KVCacheConfig) -> Groups:
        """Those of an engine.

        Raises:
            LayoutError: a group is of a kind whose blocks we do not understand.
        """
        found = tuple(_group(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups)
        if not found:
            raise LayoutError("the model has no KV cache")
        if not all(getattr(group, "enable_kv_transfer", True) for group in kv_cache_config.kv_cache_groups):
            raise LayoutError("a KV cache group that vLLM keeps from transfers is not supported")
        if all(kind.is_state for kind in found):
            raise LayoutError("models of recurrent layers (Mamba) alone are not supported: they have no KV of tokens")
        return cls(found)

    @property
    def are_windowed(self) -> bool:
        """Whether vLLM takes blocks of tokens from a request that runs."""
        return any(kind.window_tokens is not None for kind in self.kinds)

    @property
    def have_states(self) -> bool:
        """Whether some layers are recurrent."""
        return any(kind.is_state for kind in self.kinds)

    @property
    def are_plain(self) -> bool:
        """Whether a request is one table that only grows."""
        return len(self.kinds) == 1 and not self.are_windowed

    @property
    def finest_chunk_tokens(self) -> int:
        """The smallest chunk that is whole blocks in every group."""
        return math.lcm(*(kind.block_tokens for kind in self.kinds))

    def check_chunk(self, chunk_tokens: int) -> None:
        """Return if a chunk is whole blocks in every group.

        Raises:
            LayoutError: it is not; the sentence names the next size that would do.
        """
        step = self.finest_chunk_tokens
        if chunk_tokens % step:
            blocks = " and ".join(str(tokens) for tokens in sorted({kind.block_tokens for kind in self.kinds}))
            raise LayoutError(
                f"the server's chunk of {chunk_tokens} tokens is no multiple of this engine's block of {blocks}; "
                f"start the server with --chunk-size {-(-chunk_tokens // step) * step}"
            )

    def num_whole_chunks(self, tables: Tables, chunk_tokens: int) -> int:
        """Chunks that have a place for a block id in every table of tokens."""
        return min(len(table) * kind.block_tokens // chunk_tokens for kind, table in self._of_tokens(tables))

    def row(self, tables: Tables, chunk: int, chunk_tokens: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Block ids of one chunk in the groups that keep tokens, group after group: what a plan has for it.

        Args:
            start: first token whose block counts; blocks before the one that it lies in are NOT_WRITTEN.
            stop: blocks that begin at this token or after it are NOT_WRITTEN, and so are those that vLLM has taken.
        """
        ids = []
        for kind, table in self._of_tokens(tables):
            size = kind.block_tokens
            last = len(table) if stop is None else min(len(table), -(-stop // size))
            for index in range(chunk * chunk_tokens // size, (chunk + 1) * chunk_tokens // size):
                known = start // size <= index < last and table[index] != NULL_BLOCK
                ids.append(table[index] if known else NOT_WRITTEN)
        return ids

    def state_row(self, tables: Tables, num_tokens: int) -> list[int]:
        """Of each group of states, the block at the place of the state after ``num_tokens`` tokens; NOT_WRITTEN where
        there is none."""
        ids = []
        for kind, table in zip(self.kinds, tables, strict=True):
            if kind.is_state:
                index, rest = divmod(num_tokens, kind.block_tokens)
                known = rest == 0 < index <= len(table) and table[index - 1] != NULL_BLOCK
                ids.append(table[index - 1] if known else NOT_WRITTEN)
        return ids

    def windowed_blocks(self, row: Sequence[int], chunk_tokens: int) -> list[int]:
        """Of a row, the ids in groups from which vLLM takes blocks."""
        found: list[int] = []
        at = 0
        for kind in self.kinds:
            if kind.is_state:
                continue
            count = chunk_tokens // kind.block_tokens
            if kind.window_tokens is not None:
                found += row[at : at + count]
            at += count
        return found

    def _of_tokens(self, tables: Tables) -> list[tuple[Group, Sequence[int]]]:
        return [(kind, table) for kind, table in zip(self.kinds, tables, strict=True) if not kind.is_state]


def _group(spec: Any) -> Group:
    from vllm.v1 import kv_cache_interface as interface

    name = type(spec).__name__
    uniform = getattr(interface, "UniformTypeKVCacheSpecs", None)
    inner = list(spec.kv_cache_specs.values()) if uniform and isinstance(spec, uniform) else [spec]
    found = {_layer(one, interface) for one in inner}
    if len(found) != 1:
        raise LayoutError(f"a KV cache group whose layers differ in block size is not supported ({name})")
    return found.pop()


def _layer(spec: Any, interface: Any) -> Group:
    # By exact type: a subclass is another way to use a block.
    kind = type(spec)
    if kind is interface.MambaSpec:
        return _state(spec)
    if getattr(spec, "non_causal", False):
        raise LayoutError("layers that attend to later tokens are not supported: a prefix does not fix their KV")
    if getattr(spec, "tokens_per_state", 1) != 1:
        raise LayoutError("layers that keep another number of states than tokens are not supported")
    if kind in (interface.FullAttentionSpec, interface.MLAAttentionSpec):
        return Group(spec.block_size)
    if kind is interface.SlidingWindowSpec:
        return Group(spec.block_size, spec.sliding_window)
    if kind is interface.ChunkedLocalAttentionSpec:
        return Group(spec.block_size, spec.attention_chunk_size)
    raise LayoutError(f"a KV cache group of kind {kind.__name__} is not supported")


def _state(spec: Any) -> Group:
    mode = getattr(spec, "mamba_cache_mode", "none")
    if mode == "none":
        raise LayoutError(
            "without prefix caching vLLM keeps only the running state of recurrent layers (Mamba), never that at the "
            "end of a chunk; start it with --enable-prefix-caching"
        )
    if mode != "align":
        raise LayoutError(f'recurrent layers (Mamba) in cache mode "{mode}" are not supported, only in mode "align"')
    return Group(
        spec.block_size,
        is_state=True,
        has_inner_states=getattr(spec, "num_prefill_checkpoint_blocks", 0) > 0,
        has_drafts=getattr(spec, "num_speculative_blocks", 0) > 0,
    )
