"""Nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "null"
KEEPS = False


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """The options of a tier."""
    yield {"type": "null"}
