"""NIXL with its POSIX backend on a folder."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

NAME = "nixl"
REQUIRES = ("nixl_cu13",) if importlib.util.find_spec("nixl_cu13") else ("nixl_cu12",)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, object]]:
    """Options of a pool that is large enough for the suite."""
    yield {"type": "nixl", "base_path": str(folder / "nixl"), "pool_size": 64, "slot_mb": 8}
