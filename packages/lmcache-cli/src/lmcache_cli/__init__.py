"""The `lmcache` command line: talks HTTP to a cache server and to serving engines; needs no GPU and no runtime.

Reading order: ``__main__`` (guard, exit codes) -> ``app`` (which commands exist) -> ``commands/base`` (what every
command that reports metrics shares) -> one file a command -> ``client`` (HTTP) and ``render`` (two forms of one
report). What travels over HTTP is in ``api``.
"""

from __future__ import annotations

from lmcache_cli._version import __version__

__all__ = ["__version__"]
