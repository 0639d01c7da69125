"""vLLM's KV cache groups: layers whose blocks come from one table of the request, and what vLLM does with that table.

A group of sliding-window layers keeps the blocks of the last window only: vLLM gives the others back while the request
runs, leaves its null block in their places, and allocates none for what a load would bring outside the window.
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
    """``window_tokens`` is None where every block of a request stays until its end."""

    block_tokens: int
    window_tokens: int | None = None


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
        found = [_group(group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
        if not found:
            raise LayoutError("the model has no KV cache")
        if not all(getattr(group, "enable_kv_transfer", True) for group in kv_cache_config.kv_cache_groups):
            raise LayoutError("a KV cache group that vLLM keeps from transfers is not supported")
        return cls(tuple(found))

    @property
    def are_windowed(self) -> bool:
        """Whether vLLM takes blocks from a request that runs."""
        return any(kind.window_tokens is not None for kind in self.kinds)

    @property
    def are_plain(self) -> bool:
        """Whether a request is one table that only grows."""
        return len(self.kinds) == 1 and not self.are_windowed

    def check_chunk(self, chunk_tokens: int) -> None:
        """Return if a chunk is whole blocks in every group.

        Raises:
            LayoutError: it is not; the sentence names the next size that would do.
        """
        step = math.lcm(*(kind.block_tokens for kind in self.kinds))
        if chunk_tokens % step:
            blocks = " and ".join(str(tokens) for tokens in sorted({kind.block_tokens for kind in self.kinds}))
            raise LayoutError(
                f"the server's chunk of {chunk_tokens} tokens is no multiple of this engine's block of {blocks}; "
                f"start the server with --chunk-size {-(-chunk_tokens // step) * step}"
            )

    def num_whole_chunks(self, tables: Tables, chunk_tokens: int) -> int:
        """Chunks that have a place for a block id in every table."""
        return min(
            len(table) * kind.block_tokens // chunk_tokens for kind, table in zip(self.kinds, tables, strict=True)
        )

    def row(self, tables: Tables, chunk: int, chunk_tokens: int, start: int = 0, stop: int | None = None) -> list[int]:
        """Block ids of one chunk, group after group: what a plan has for it.

        Args:
            start: first token whose block counts; blocks before the one that it lies in are NOT_WRITTEN.
            stop: blocks that begin at this token or after it are NOT_WRITTEN, and so are those that vLLM has taken.
        """
        ids = []
        for kind, table in zip(self.kinds, tables, strict=True):
            size = kind.block_tokens
            last = len(table) if stop is None else min(len(table), -(-stop // size))
            for index in range(chunk * chunk_tokens // size, (chunk + 1) * chunk_tokens // size):
                known = start // size <= index < last and table[index] != NULL_BLOCK
                ids.append(table[index] if known else NOT_WRITTEN)
        return ids

    def windowed_blocks(self, row: Sequence[int], chunk_tokens: int) -> list[int]:
        """Of a row, the ids in groups from which vLLM takes blocks."""
        found: list[int] = []
        at = 0
        for kind in self.kinds:
            count = chunk_tokens // kind.block_tokens
            if kind.window_tokens is not None:
                found += row[at : at + count]
            at += count
        return found


def _group(spec: Any) -> Group:
    from vllm.v1 import kv_cache_interface as interface

    name = type(spec).__name__
    uniform = getattr(interface, "UniformTypeKVCacheSpecs", None)
    inner = list(spec.kv_cache_specs.values()) if uniform and isinstance(spec, uniform) else [spec]
    found = set()
    for one in inner:
        if isinstance(one, interface.MambaSpec):
            raise LayoutError(
                "recurrent layers (Mamba) are not supported: their state is not that of a block of tokens"
            )
        if getattr(one, "non_causal", False):
            raise LayoutError("layers that attend to later tokens are not supported: a prefix does not fix their KV")
        if getattr(one, "tokens_per_state", 1) != 1:
            raise LayoutError("layers that keep another number of states than tokens are not supported")
        # By exact type: a subclass is another way to use a block.
        if type(one) in (interface.FullAttentionSpec, interface.MLAAttentionSpec):
            found.add(Group(one.block_size))
        elif type(one) is interface.SlidingWindowSpec:
            found.add(Group(one.block_size, one.sliding_window))
        else:
            raise LayoutError(f"a KV cache group of kind {type(one).__name__} is not supported")
    if len(found) != 1:
        raise LayoutError(f"a KV cache group whose layers differ in block size is not supported ({name})")
    return found.pop()
