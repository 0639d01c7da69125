"""Encrypted objects in the memory of the test's own process."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "sealed-memory"
REQUIRES = ("cryptography",)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier, with a key of its own."""
    key = folder / "key"
    key.touch(0o600)
    key.write_text(secrets.token_hex(32) + "\n")
    yield {
        "type": "memory",
        "capacity_gb": 0.25,
        "seal": {"key_file": str(key)},
    }
