"""Mooncake Store: its master and one node, each a process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mooncake_running import master, node

NAME = "mooncake"
REQUIRES = ("mooncake",)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, object]]:
    """Options of a client that lends no memory itself."""
    with master(folder) as store, node(store.address):
        yield {"type": "mooncake", "master": store.address, "timeout_s": 5.0}
