"""Which software took part in a run, as far as it says so."""

from __future__ import annotations

import json
import platform
from dataclasses import replace

from lmcache_cli import api
from lmcache_cli._version import __version__
from lmcache_cli.client import transport
from lmcache_cli.errors import ServerError
from lmcache_cli.target import Target

WAIT_S_MAX = 5.0
CHARS_MAX = 200


def collect(engine: Target, server: Target | None) -> dict[str, str | None]:
    """Versions of this tool, Python, the engine and the cache server; None where one is absent or does not say."""
    return {
        "lmcache": __version__,
        "python": platform.python_version(),
        "engine": ask(engine),
        "server": None if server is None else ask(server),
    }


def ask(target: Target) -> str | None:
    """What ``GET /version`` answers: vLLM an object, a cache server the text itself; None for anything else."""
    target = replace(target, timeout_s=min(target.timeout_s, WAIT_S_MAX))
    url = f"{target.url}{api.PATH_VERSION}"
    try:
        with transport.connect(target) as http:
            document = json.loads(transport.answer(http, "GET", url, None, target.timeout_s))
    except (ServerError, ValueError, RecursionError):
        return None
    if isinstance(document, dict):
        document = document.get("version")
    return document[:CHARS_MAX] if isinstance(document, str) and document else None
