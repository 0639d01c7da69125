"""A Redis cluster of three servers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis_running import options, redis_cluster

NAME = "redis_cluster"
REQUIRES = ("redis",)
PROGRAMS = ("redis-server",)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier on a cluster of its own."""
    with redis_cluster(folder / "cluster") as servers:
        yield options(servers[1], cluster=True)
