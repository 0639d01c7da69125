"""Fixtures: the command line in this process, and as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import lmcache_cli
from lmcache_cli.__main__ import main

SETTINGS = (
    "LMCACHE_URL",
    "LMCACHE_ENGINE_URL",
    "LMCACHE_TOKEN",
    "LMCACHE_TOKEN_FILE",
    "OPENAI_API_KEY",
    "NO_COLOR",
    "PYTHONIOENCODING",
)
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    status: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SETTINGS, *PROXIES, *map(str.upper, PROXIES)):
        monkeypatch.delenv(name, raising=False)
    source = str(Path(lmcache_cli.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, *filter(None, [os.environ.get("PYTHONPATH")])]))


@pytest.fixture
def lmcache(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run words in this process."""

    def run(*words: str) -> Ended:
        capsys.readouterr()
        status = main(words)
        captured = capsys.readouterr()
        return Ended(status, captured.out, captured.err)

    return run


@pytest.fixture
def process() -> Callable[..., Ended]:
    """Run words as `python -m lmcache_cli`."""

    def run(*words: str) -> Ended:
        command = [sys.executable, "-m", "lmcache_cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def process_modules() -> Callable[[str], set[str]]:
    """Run code in a fresh interpreter and return the names of all modules it has loaded in the end."""

    def run(code: str) -> set[str]:
        script = f"import sys\n{code}\nprint('loaded', *sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
        assert "Traceback" not in done.stderr, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("loaded ")]
        return set(line.split())

    return run
