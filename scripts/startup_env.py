"""Two environments whose commands are timed: each wheel of this checkout as a user installs it."""

from __future__ import annotations

from pathlib import Path

import artefacts
from environments import environment, install_wheel, main_version


def startup_environments() -> dict[str, Path]:
    """Their pythons, by "ours thin" and "ours full"; without torch, which no command imports."""
    version = main_version()
    thin = environment("startup-thin", version, artefacts.thin_requirements())
    install_wheel(thin, artefacts.thin_wheel())
    full = environment("startup-full", version, artefacts.full_requirements())
    install_wheel(full, artefacts.full_wheel(version))
    return {"ours thin": thin, "ours full": full}
