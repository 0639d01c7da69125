"""`python -m lmcache.server`: the same as `lmcache server`."""

from __future__ import annotations

from lmcache.server.command import server

server(prog_name="lmcache server")
