"""What the command line may import, and when."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from collections.abc import Callable

import pytest

import lmcache_cli

FORBIDDEN = [
    *("torch", "numpy", "zmq", "msgspec", "fastapi", "uvicorn", "psutil", "prometheus_client", "lmcache"),
    *("termios", "fcntl", "pwd", "grp", "resource"),
]
BLOCK = f"""
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ImportError("forbidden here: " + name)

sys.meta_path.insert(0, Finder())
for name in {FORBIDDEN!r}:
    sys.modules.pop(name, None)
"""
MODULES = sorted(module.name for module in pkgutil.walk_packages(lmcache_cli.__path__, "lmcache_cli."))


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_every_module_imports_where_runtime_and_posix_modules_are_forbidden() -> None:
    assert {"lmcache_cli.api", "lmcache_cli.client", "lmcache_cli.commands.query"} <= set(MODULES)
    # a module at a time, so that none is saved by another's imports having failed before
    done = run(BLOCK + f"import importlib\nfor name in {MODULES!r}:\n    importlib.import_module(name)\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_block_blocks() -> None:
    assert run(f"{BLOCK}import fcntl").returncode == 1


@pytest.mark.parametrize("words", [["--help"], ["ping", "-h"], ["ping", "kvcache", "--url", "127.0.0.1:1"]])
@pytest.mark.parametrize("form", [[], ["--format", "json"]])
def test_help_and_ping_load_neither_httpx_nor_rich(
    process_modules: Callable[[str], set[str]], words: list[str], form: list[str]
) -> None:
    if words[-1].startswith("-"):
        form = []
    loaded = process_modules(f"from lmcache_cli.__main__ import main; main({[*words, *form]!r})")
    assert "click" in loaded
    assert not loaded & {"httpx", "rich", "asyncio"}


def test_ping_does_not_look_for_plug_ins(process_modules: Callable[[str], set[str]]) -> None:
    loaded = process_modules("from lmcache_cli.__main__ import main; main(['ping', 'kvcache', '--url', '127.0.0.1:1'])")
    assert "importlib.metadata" not in loaded


def test_rich_is_loaded_only_for_a_terminal(process_modules: Callable[[str], set[str]]) -> None:
    loaded = process_modules(
        "from lmcache_cli.__main__ import main; main(['describe', 'kvcache', '--url', '127.0.0.1:1'])"
    )
    assert "httpx" in loaded
    assert "lmcache_cli.render" in loaded
    assert "lmcache_cli.commands.ping" not in loaded
