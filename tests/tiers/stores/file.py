"""A folder of this machine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "file"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier in a folder that does not exist yet."""
    yield {"type": "file", "base_path": str(folder / "objects"), "capacity_gb": 0.25}
