"""Environments with the upstream project's releases, each alone in its own, for the gate `compat`.

    python scripts/upstream_env.py

makes them under .nox and prints where their interpreters are. One holds torch and the newest release as pip installs
it, with all that it requires. The older releases stand in environments of their own that share those requirements:
only the release itself differs, and every one of them runs on a CPU that way. The thin command line has no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

from environments import environment, main_version, site_packages, torch_site

NEWEST = "0.5.6"
OLDER = ("0.5.0", "0.4.5", "0.4.2")  # each the first of its kind that a client must tell apart (docs/compatibility.md)
CLI = "0.5.7rc3.dev0"


def upstream_pythons() -> dict[str, Path]:
    """Interpreters by release, and that of the thin command line as `cli`; what must be downloaded is said.

    Raises:
        Missing: no interpreter of a version that the full wheel supports.
        subprocess.CalledProcessError: pip failed.
    """
    version, torch = main_version(), torch_site()
    print(
        f"upstream releases, unless they are here already: lmcache=={NEWEST} with all it requires but torch (0.5 GB to "
        f"download), lmcache=={', '.join(OLDER)} alone (0.01 GB each), lmcache-cli=={CLI} (0.1 GB)",
        flush=True,
    )
    newest = environment("upstream", version, [f"lmcache=={NEWEST}"], sites=[torch])
    pythons = {NEWEST: newest}
    for release in OLDER:
        # pip would otherwise find the newest one in the shared folder and think of replacing it
        alone = ["--ignore-installed", "--no-deps", f"lmcache=={release}"]
        pythons[release] = environment(f"upstream-{release}", version, alone, sites=[site_packages(newest), torch])
    pythons["cli"] = environment("upstream-cli", version, [f"lmcache-cli=={CLI}"])
    return pythons


if __name__ == "__main__":
    print(json.dumps({name: str(path) for name, path in upstream_pythons().items()}, indent=1))
