"""HTTP: one class a service, one method an endpoint; each is a context manager. The only door to httpx.

Methods return what ``api`` describes, or raise what ``errors`` draws. No proxy for loopback, nothing from netrc, no
redirects, no retries; every call has a deadline and every answer a size limit.
"""

from __future__ import annotations

from lmcache_cli.client.cache_server import CacheServer
from lmcache_cli.client.engine import Engine, TokenCount
from lmcache_cli.client.transport import probe

__all__ = ["CacheServer", "Engine", "TokenCount", "probe"]
