"""Names that vLLM's module of the connector's name imports for its built-in class, which ours replaces.

They are never instantiated: with LMCACHE_USE_UPSTREAM_MP set, vLLM would use its own class, and that one speaks another
project's protocol. Saying so at once beats a hang.
"""

from __future__ import annotations

from typing import NoReturn


class _Replaced:
    def __init__(self, *_: object, **__: object) -> None:
        _refuse()


def _refuse() -> NoReturn:
    raise RuntimeError("unset LMCACHE_USE_UPSTREAM_MP: vLLM's built-in LMCache connector cannot talk to this LMCache")


class LMCacheMPSchedulerAdapter(_Replaced):
    """Scheduler's side of vLLM's built-in class."""


class LMCacheMPWorkerAdapter(_Replaced):
    """Worker's side of vLLM's built-in class."""


class LoadStoreOp(_Replaced):
    """One operation of vLLM's built-in class."""


class ParallelStrategy(_Replaced):
    """Ranks of vLLM's built-in class."""
