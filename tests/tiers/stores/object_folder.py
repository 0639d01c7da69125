"""A folder, through the library of object stores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "object_folder"
REQUIRES = ("obstore",)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier in a folder of its own."""
    yield {"type": "object", "url": f"file://{folder}/objects"}
