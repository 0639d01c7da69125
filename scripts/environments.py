"""Python environments for the gates: made once under .nox, used again while their recipe is unchanged.

Stdlib only, and independent of nox: ``pip --python`` of the interpreter that runs this installs into environments that
have no pip of their own, which makes an empty one cost a tenth of a second.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".nox"
CACHE = ROOT / ".cache"
TORCH = "torch==2.13.0"
FULL_PYTHONS = ("3.11", "3.12", "3.13")
THIN_PYTHONS = ("3.10", *FULL_PYTHONS)


class Missing(Exception):
    """No usable interpreter of a version on this machine; its text says how to get one."""


@functools.cache
def find_python(version: str) -> str:
    """Path of a working interpreter of ``version`` ("3.12") that can also compile against itself if there is one.

    A pyenv shim may stand in PATH with nothing behind it, so each candidate is run.

    Raises:
        Missing: there is none.
    """
    name = f"python{version}"
    pyenv = os.environ.get("PYENV_ROOT", os.path.expanduser("~/.pyenv"))
    candidates = [os.path.join(folder, name) for folder in os.get_exec_path()]
    candidates += sorted(glob.glob(f"{pyenv}/versions/{version}.*/bin/{name}"))
    candidates += sorted(glob.glob(os.path.expanduser(f"~/.local/share/uv/python/cpython-{version}.*/bin/{name}")))
    probe = (
        "import os, sys, sysconfig, venv; "
        "print(sys.executable, os.path.exists(sysconfig.get_path('include') + '/Python.h'), sep='\\n')"
    )
    without_headers = None
    for candidate in candidates:
        if not os.access(candidate, os.X_OK):
            continue
        answer = subprocess.run([candidate, "-I", "-c", probe], capture_output=True, text=True)
        if answer.returncode == 0:
            executable, headers = answer.stdout.split("\n")[:2]
            if headers == "True":
                return executable
            without_headers = without_headers or executable
    if without_headers:
        return without_headers
    raise Missing(f"no working {name} in PATH, in pyenv or in uv's folder")


@functools.cache
def main_version() -> str:
    """The Python that gates run on unless they say otherwise: the first that is here of those the full wheel supports.

    Raises:
        Missing: none is.
    """
    for version in FULL_PYTHONS:
        try:
            find_python(version)
        except Missing:
            continue
        return version
    raise Missing(f"none of Python {', '.join(FULL_PYTHONS)} is on this machine")


def digest(*parts: object) -> str:
    """Hex digest of a recipe: any JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def pip(python: str | Path, *arguments: str) -> None:
    """Run pip on behalf of another interpreter; its output is shown only when it fails.

    Raises:
        subprocess.CalledProcessError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        print(done.stdout, flush=True)
        raise subprocess.CalledProcessError(done.returncode, command)


def venv(folder: Path, base: str, sites: Sequence[Path] = ()) -> Path:
    """An empty environment; ``sites`` are folders of packages that it shares with others. Returns its python."""
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([base, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / "bin" / "python"
    if sites:
        (site_packages(python) / "_shared_sites.pth").write_text("".join(f"{site}\n" for site in sites))
    return python


def site_packages(python: str | Path) -> Path:
    """Where an environment keeps its packages."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(subprocess.check_output([str(python), "-c", code], text=True).strip())


def environment(
    name: str, version: str, requirements: Sequence[str], sites: Sequence[Path] = (), script: Path | None = None
) -> Path:
    """The environment .nox/NAME with these requirements; made anew when the recipe changed. Returns its python.

    Args:
        sites: folders of packages that it shares with other environments.
        script: run as ``script PYTHON`` before the requirements are installed; its text is part of the recipe.

    Raises:
        Missing: no interpreter of that version.
        subprocess.CalledProcessError: a step failed.
    """
    base = find_python(version)
    folder = ENVIRONMENTS / name
    recipe = digest(base, list(requirements), [str(site) for site in sites], script.read_text() if script else None)
    python = folder / "bin" / "python"
    if not _is_made(folder, recipe):
        start = time.monotonic()
        venv(folder, base, sites)
        if script:
            subprocess.run([sys.executable, str(script), str(python)], check=True)
        if requirements:
            pip(python, "install", *requirements)
        _mark_made(folder, recipe, start)
    return python


def install_wheel(python: Path, *wheels: Path) -> None:
    """Put exactly these wheel files of ours into an environment that has their requirements already."""
    stamp = python.parent.parent / "wheels.digest"
    recipe = digest([hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels])
    if stamp.exists() and stamp.read_text() == recipe:
        return
    stamp.unlink(missing_ok=True)
    pip(python, "install", "--no-deps", "--no-index", "--force-reinstall", *map(str, wheels))
    stamp.write_text(recipe)


def torch_site() -> Path:
    """Folder with torch and what it requires, made once; environments share it through a .pth file."""
    base = find_python(main_version())
    folder = CACHE / f"torch-cp{main_version().replace('.', '')}"
    recipe = digest(base, TORCH)
    if not _is_made(folder, recipe):
        start = time.monotonic()
        shutil.rmtree(folder, ignore_errors=True)
        print(f"downloading {TORCH}: 0.2 GB as a CPU build, 3 GB where the index has CUDA builds only", flush=True)
        pip(base, "install", "--target", str(folder), TORCH)
        _mark_made(folder, recipe, start)
    return folder


def _is_made(folder: Path, recipe: str) -> bool:
    stamp = folder / "recipe.digest"
    return stamp.exists() and stamp.read_text() == recipe


def _mark_made(folder: Path, recipe: str, start: float) -> None:
    (folder / "recipe.digest").write_text(recipe)
    print(f"{folder.relative_to(ROOT)} made in {time.monotonic() - start:.0f} s", flush=True)
