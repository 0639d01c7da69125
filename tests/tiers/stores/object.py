"""An S3 server."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from object_running import options, s3_server

NAME = "object"
REQUIRES = ("obstore", "moto")


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier on a bucket of its own."""
    with s3_server(folder / "s3") as server:
        yield options(server, folder)
