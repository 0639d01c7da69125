"""A Redis server that speaks TLS only and asks for a certificate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from redis_running import certificates, options, redis_server, tls_options

NAME = "redis_tls"
REQUIRES = ("redis",)
PROGRAMS = ("redis-server", "openssl")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier on a server of its own."""
    paths = certificates(folder)
    with redis_server(folder / "redis", *tls_options(paths)) as server:
        yield options(server, tls=True, cacert=paths["ca"], cert=paths["cert"], key=paths["key"])
