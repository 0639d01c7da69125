"""Builds what we ship: sdists first, then the wheels from the sdists, so that gates test just what users get.

Results lie under .cache/wheels/DIGEST, named after everything that goes in. The compiler's output lies under
.cache/build/DIGEST, named after the C++ sources alone, so that a change in Python compiles nothing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

from environments import CACHE, ROOT, environment, main_version

THIN = ROOT / "packages" / "lmcache-cli"
FULL_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
THIN_PROJECT = tomllib.loads((THIN / "pyproject.toml").read_text())
_KEPT_MAX = 3


def group(*names: str) -> list[str]:
    """Requirements of dependency groups of pyproject.toml."""
    return [line for name in names for line in FULL_PROJECT["dependency-groups"][name]]


def thin_requirements() -> list[str]:
    """What the thin wheel requires."""
    return list(THIN_PROJECT["project"]["dependencies"])


def full_requirements() -> list[str]:
    """What the full wheel requires, without torch: only engines need it, and it costs gigabytes."""
    return [line for line in FULL_PROJECT["project"]["dependencies"] if not line.startswith("torch")]


def thin_wheel() -> Path:
    """Wheel of lmcache-cli, built from its sdist."""
    out = sdists()
    return _one(out, "lmcache_cli-*.whl") or _build(out, main_version(), _unpacked(out, "lmcache_cli-*.tar.gz"))


def full_wheel(version: str) -> Path:
    """Wheel of lmcache for a Python, built from its sdist."""
    out = sdists()
    wheel = _one(out, f"lmcache-*-cp{version.replace('.', '')}-*.whl")
    if wheel is None:
        source = _unpacked(out, "lmcache-*.tar.gz")
        wheel = _build(out, version, source, f"-Cbuild-dir={CACHE}/build/{_digest_of([source / 'csrc'])}/{version}")
    return wheel


def build_environment(version: str) -> Path:
    """Environment with every build requirement of both projects, for builds without isolation; returns its python."""
    requires = [line for project in (FULL_PROJECT, THIN_PROJECT) for line in project["build-system"]["requires"]]
    return environment(f"build-{version}", version, requires + group("build"))


@functools.cache
def sdists() -> Path:
    """Folder of the artefacts of the tree as it is at the first call: both sdists, and the wheels asked for so far."""
    sources = [ROOT / name for name in ("csrc", "packages", "pyproject.toml", "README.md", "CHANGELOG.md")]
    out = CACHE / "wheels" / _digest_of(sources)
    if not (_one(out, "lmcache-*.tar.gz") and _one(out, "lmcache_cli-*.tar.gz")):
        _forget_old(out.parent)
        for project in (ROOT, THIN):
            _run_build(main_version(), "--sdist", f"--outdir={out}", str(project))
    return out


def _unpacked(out: Path, pattern: str) -> Path:
    sdist = next(out.glob(pattern))
    # one place for good: a path that changes would make CMake start over
    place = CACHE / "sdist" / sdist.name.removesuffix(".tar.gz")
    shutil.rmtree(place, ignore_errors=True)
    shutil.unpack_archive(sdist, place.parent)
    return place


def _build(out: Path, version: str, source: Path, *options: str) -> Path:
    start = time.monotonic()
    before = set(out.glob("*.whl"))
    _run_build(version, "--wheel", f"--outdir={out}", *options, str(source))
    (wheel,) = set(out.glob("*.whl")) - before
    size = wheel.stat().st_size / 1024
    print(f"built {wheel.name}, {size:.0f} KiB, in {time.monotonic() - start:.0f} s", flush=True)
    return wheel


def _run_build(version: str, *arguments: str) -> None:
    python = build_environment(version)
    command = [str(python), "-m", "build", "--no-isolation", *arguments]
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        print(done.stdout, flush=True)
        raise subprocess.CalledProcessError(done.returncode, command)


def _one(where: Path, pattern: str) -> Path | None:
    return next(iter(sorted(where.glob(pattern))), None)


def _digest_of(paths: list[Path]) -> str:
    state = hashlib.sha256()
    for file in (file for path in paths for file in ([path] if path.is_file() else sorted(path.rglob("*")))):
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            state.update(f"{file.relative_to(ROOT)}\0{content}\n".encode())
    return state.hexdigest()[:16]


def _forget_old(where: Path) -> None:
    old = sorted(where.glob("*"), key=lambda path: path.stat().st_mtime)
    for path in old[: max(0, len(old) - _KEPT_MAX)]:
        shutil.rmtree(path)
