"""Wheels as files, and environments that hold nothing but what a test puts there. Run by `nox -s guard`."""

from __future__ import annotations

import email
import email.message
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Wheel:
    """A wheel file and what it says about itself."""

    path: Path

    @property
    def version(self) -> str:
        return self.path.name.split("-")[1]

    @property
    def names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            return archive.namelist()

    def read(self, name: str) -> bytes:
        with zipfile.ZipFile(self.path) as archive:
            return archive.read(name)

    def info(self, name: str) -> str:
        """A file of the dist-info folder, empty when it is not there."""
        found = [entry for entry in self.names if entry.endswith(f".dist-info/{name}")]
        return self.read(found[0]).decode() if found else ""

    @property
    def metadata(self) -> email.message.Message:
        return email.message_from_string(self.info("METADATA"))


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    status: int
    text: str


@dataclass(frozen=True)
class Environment:
    """A fresh virtual environment. What our wheels require is on its path; our wheels are not."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def pip(self, *arguments: str | Path) -> None:
        """As a user would call it in this environment, but without a package index."""
        options = ["--no-deps", "--no-index"] if arguments[0] == "install" else []
        command = [sys.executable, "-m", "pip", "--python", str(self.python), *map(str, arguments), *options]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=170)
        assert done.returncode == 0, done.stdout

    def lmcache(self, *words: str) -> Answer:
        return self._run(str(self.folder / "bin" / "lmcache"), *words)

    def run(self, code: str) -> Answer:
        return self._run(str(self.python), "-c", code)

    def has_command(self) -> bool:
        return (self.folder / "bin" / "lmcache").exists()

    def _run(self, *command: str) -> Answer:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=env, timeout=60)
        return Answer(done.returncode, done.stdout + done.stderr)


def _given(name: str) -> Path:
    if name not in os.environ:
        pytest.skip("needs both wheels built: nox -s guard")
    return Path(os.environ[name])


def _newest(pattern: str) -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    (path,) = _given("LMCACHE_TEST_WHEELS").glob(pattern.format(tag=tag))
    return path


@pytest.fixture(scope="session")
def thin() -> Wheel:
    return Wheel(_newest("lmcache_cli-*.whl"))


@pytest.fixture(scope="session")
def full() -> Wheel:
    return Wheel(_newest("lmcache-*-{tag}-*.whl"))


@pytest.fixture(scope="session")
def sdists() -> list[Path]:
    return [_newest("lmcache-*.tar.gz"), _newest("lmcache_cli-*.tar.gz")]


@pytest.fixture(scope="session")
def build_python() -> Path:
    """Python of an environment with every build requirement."""
    return _given("LMCACHE_TEST_BUILD_PYTHON")


@pytest.fixture
def environment(tmp_path: Path) -> Callable[..., Environment]:
    """Makes an environment and installs wheels into it, one pip call after another."""

    def make(*wheels: Wheel, name: str = "env") -> Environment:
        made = Environment(tmp_path / name)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(made.folder)], check=True, timeout=60)
        (site,) = made.folder.glob("lib/python*/site-packages")
        (site / "requirements.pth").write_text(f"{_given('LMCACHE_TEST_SITE')}\n")
        for wheel in wheels:
            made.pip("install", wheel.path)
        return made

    return make
