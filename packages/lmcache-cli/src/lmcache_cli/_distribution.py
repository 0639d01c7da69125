"""Guard, level 1: refuse to run where both distributions are installed.

`lmcache` and `lmcache-cli` ship the same files. Installers accept both without a word, and removing one then deletes
the other's files, so an environment that holds both is refused before anything else happens. Found by looking for the
two dist-info folders, since importing importlib.metadata alone costs 40 ms.
"""

from __future__ import annotations

import os
import re
import sys

from lmcache_cli.errors import InstallConflict

FULL = "lmcache"
THIN = "lmcache-cli"

_DIST_INFO = re.compile(r"lmcache(?P<thin>[-_.]+cli)?-(?P<version>\d[^-]*)\.dist-info", re.IGNORECASE)


def installed() -> dict[str, str]:
    """Versions of our installed distributions by name (`lmcache`, `lmcache-cli`); empty in a bare checkout."""
    found: dict[str, str] = {}
    for folder in _folders():
        for name, version in _distributions_in(folder):
            found.setdefault(name, version)
    return found


def check() -> None:
    """Raise InstallConflict (an ImportError) when both distributions are installed."""
    found = installed()
    if FULL in found and THIN in found:
        raise InstallConflict(
            f"{FULL} {found[FULL]} and {THIN} {found[THIN]} are both installed and share files; remove both with\n"
            f"    pip uninstall -y {FULL} {THIN}\n"
            f"then install one of them again from its wheel file or a checkout:\n{repair_commands()}"
        )


def repair_commands() -> str:
    """How to install one of the two again, one indented command a line.

    Never by bare name: our names on the public package index belong to another project.
    """
    return (
        f"    pip install ./{FULL}-VERSION-PLATFORM.whl             (full; in a checkout: pip install .)\n"
        f"    pip install ./{THIN.replace('-', '_')}-VERSION-py3-none-any.whl     "
        f"(command line only; in a checkout: pip install packages/{THIN})"
    )


def _folders() -> list[str]:
    """Where a dist-info of ours can lie: beside this package, or (editable installs) in a site folder of sys.path."""
    beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    sites = [p for p in sys.path if os.path.basename(os.path.normpath(p)) in ("site-packages", "dist-packages")]
    return list(dict.fromkeys([beside, *sites]))


def _distributions_in(folder: str) -> list[tuple[str, str]]:
    try:
        names = sorted(os.listdir(folder), reverse=True)
    except OSError:
        return []
    matches = [match for match in map(_DIST_INFO.fullmatch, names) if match]
    return [
        (THIN if match["thin"] else FULL, match["version"])
        for match in matches
        # an uninstaller that was cut off leaves the folder, but not the file
        if os.path.isfile(os.path.join(folder, match.string, "METADATA"))
    ]
