"""A Redis server with a password."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis_running import options, redis_server

NAME = "redis"
REQUIRES = ("redis",)
PROGRAMS = ("redis-server",)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier on a server of its own."""
    secret = folder / "password"
    secret.write_text("correct horse\n")
    with redis_server(folder / "redis", "--requirepass", "correct horse") as server:
        yield options(server, password_file=str(secret))
