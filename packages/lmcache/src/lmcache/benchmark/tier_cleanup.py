"""What a benchmark stored, taken out of the tier again, by the adapter itself and without a server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from lmcache.errors import LMCacheError, TierError
from lmcache.tiers import make_tier

CALL_S = 15.0
"""Longest wait for one call."""

BATCH_KEYS = 64
FOLDER_TYPES, FOLDER_OPTION = ("file", "nixl"), "base_path"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Leftovers:
    """``num_left`` is None where the tier could not be asked; then ``reason`` says why."""

    num_removed: int
    num_left: int | None
    reason: str | None = None


class Site:
    """Where the benchmark may write: a tier in a folder gets one of its own inside the one that was named, so that
    nothing of others can be evicted or counted; any other tier is used as it is."""

    def __init__(self, options: Mapping[str, object]) -> None:
        self.options = dict(options)
        self._parent: str | None = None
        self._folder: str | None = None
        if options.get("type") in FOLDER_TYPES and isinstance(options.get(FOLDER_OPTION), str):
            self._parent = os.path.abspath(str(options[FOLDER_OPTION]))
            self._is_parent_ours = not os.path.exists(self._parent)
            self._folder = os.path.join(self._parent, f"lmcache-bench-{os.getpid()}-{os.urandom(4).hex()}")
            self.options[FOLDER_OPTION] = self._folder

    def clean(self, keys: Sequence[bytes]) -> Leftovers:
        """Remove what was stored under these keys; no server may run on the tier. Never raises for the store's sake."""
        if self._folder is None:
            return asyncio.run(_remove(self.options, keys))
        num_before = sum(len(files) for _, _, files in os.walk(self._folder))
        shutil.rmtree(self._folder, ignore_errors=True)
        num_left = sum(len(files) for _, _, files in os.walk(self._folder))
        if self._is_parent_ours and self._parent is not None:
            with contextlib.suppress(OSError):
                os.rmdir(self._parent)
        reason = f"{self._folder} could not be removed" if num_left else None
        return Leftovers(min(len(keys), num_before - num_left), num_left, reason)


async def _remove(options: Mapping[str, object], keys: Sequence[bytes]) -> Leftovers:
    tier = make_tier(options)
    if not tier.survives or not keys:
        return Leftovers(0, 0)
    num_removed = num_left = 0
    try:
        await _within(tier.open())
        for start in range(0, len(keys), BATCH_KEYS):
            batch = keys[start : start + BATCH_KEYS]
            num_before = sum(size > 0 for size in await _within(tier.contains(batch)))
            await _within(tier.delete(batch))
            num_after = sum(size > 0 for size in await _within(tier.contains(batch)))
            num_left += num_after
            num_removed += num_before - num_after
    except LMCacheError as error:
        return Leftovers(num_removed, None, str(error))
    finally:
        with contextlib.suppress(LMCacheError):
            await _within(tier.close())
    return Leftovers(num_removed, num_left)


async def _within(call: Coroutine[Any, Any, T]) -> T:
    """A call and its deadline; it is never cancelled, because adapters need not expect that."""
    task = asyncio.ensure_future(call)
    done, _ = await asyncio.wait([task], timeout=CALL_S)
    if not done:
        raise TierError(f"no answer within {CALL_S:g} s")
    return task.result()
