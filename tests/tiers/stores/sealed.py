"""A folder of this machine that only sees encrypted objects."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "sealed-file"
REQUIRES = ("cryptography",)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier in a folder that does not exist yet, with a key of its own."""
    key = folder / "key"
    key.touch(0o600)
    key.write_text(secrets.token_hex(32) + "\n")
    yield {
        "type": "file",
        "base_path": str(folder / "objects"),
        "capacity_gb": 0.25,
        "seal": {"key_file": str(key)},
    }
