"""The HTTP API: shapes and paths are those of ``lmcache_cli.api``; every answer comes from the core by messages.

``app`` is the application, ``gate`` who may ask what, ``description`` what /openapi.json says besides, ``replies`` what
all routes share, ``tenancy`` and ``prefix`` one subject each.
"""

from __future__ import annotations

from lmcache.server.http.app import build_app
from lmcache.server.http.gate import Access
from lmcache.server.http.serving import QuietServer, build_server

__all__ = ["Access", "QuietServer", "build_app", "build_server"]
