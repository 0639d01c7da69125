"""KV cache server for LLM engines: the runtime. Importing this package is cheap and only checks the install.

The command line (``lmcache_cli``) is part of this distribution and also a distribution of its own. Both in one
environment damage each other, so an engine that loads us must hear it at once, not in mid-request.
"""

from __future__ import annotations

__all__ = ["__version__"]


def _incomplete(cause: ImportError) -> ImportError:
    from pathlib import Path

    site = Path(__file__).resolve().parent.parent
    infos = sorted(path.name for path in site.glob("lmcache-*.dist-info"))
    versions = [name.removeprefix("lmcache-").removesuffix(".dist-info") for name in infos]
    name = f"lmcache {versions[0]}" if versions else "lmcache"
    wheel = f"lmcache-{versions[0]}-*.whl" if versions else "lmcache-*.whl"
    return ImportError(
        f"this install of {name} is incomplete ({cause}): its command line is gone, most likely because lmcache-cli "
        "was installed into the same environment and removed again. Repair it with\n"
        "    python -m pip uninstall -y lmcache lmcache-cli\n"
        f"    python -m pip install {wheel}    (the wheel file; or '.' in a checkout)"
    )


try:
    from lmcache_cli import _distribution
    from lmcache_cli._version import __version__
except ImportError as _cause:
    raise _incomplete(_cause) from _cause

_distribution.check()  # raises an ImportError that names both distributions and the way out
