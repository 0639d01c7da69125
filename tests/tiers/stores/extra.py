"""The adapter of another distribution in ``examples/extra_tier``, found by its entry point as if it were installed."""

from __future__ import annotations

import contextlib
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAME = "extra"
EXAMPLE = Path(__file__).parents[3] / "examples" / "extra_tier"


@contextlib.contextmanager
def running(folder: Path) -> Iterator[dict[str, Any]]:
    """The options of a tier with a database that does not exist yet."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    about = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, points),) = project["entry-points"].items()
    lines = [f"[{group}]", *(f"{name} = {target}" for name, target in points.items())]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    added = [str(EXAMPLE), str(folder)]
    sys.path += added
    try:
        yield {"type": "sqlite", "path": str(folder / "objects.sqlite"), "capacity_gb": 0.25}
    finally:
        for path in added:
            sys.path.remove(path)
