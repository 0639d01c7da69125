"""A third-party package adds a command: the example of docs/extending.md, built and installed beside our wheel."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Environment, Wheel

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "extra_command"


@pytest.fixture
def extended(environment: Callable[..., Environment], thin: Wheel, build_python: Path, tmp_path: Path) -> Environment:
    """An environment with the thin wheel and the example."""
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    command = [build_python, "-m", "build", "--wheel", "--no-isolation", f"--outdir={tmp_path}", source]
    built = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=170)
    assert built.returncode == 0, built.stdout
    (wheel,) = tmp_path.glob("lmcache_uptime-*.whl")
    made = environment(thin)
    made.pip("install", wheel)
    return made


def test_the_command_of_another_package_is_listed_and_has_all_common_options(extended: Environment) -> None:
    assert "uptime" in extended.lmcache("-h").text
    helped = extended.lmcache("uptime", "-h")
    assert helped.status == 0
    for option in ("--url", "--timeout", "--header", "--format", "--output", "--quiet"):
        assert option in helped.text


def test_its_failure_is_one_document_like_any_other(extended: Environment) -> None:
    done = extended.lmcache("uptime", "--url", "127.0.0.1:1", "--format", "json")
    assert done.status == 1
    document, _ = json.JSONDecoder().raw_decode(done.text)
    assert document["title"] == "Uptime"
    assert document["metrics"] == {"status": "FAIL", "url": None, "uptime_s": None}
    assert document["error"]["code"] == "unreachable"


def test_a_package_that_cannot_be_imported_breaks_its_own_command_only(extended: Environment) -> None:
    (module,) = extended.folder.glob("lib/python*/site-packages/lmcache_uptime.py")
    module.write_text("import no_such_module\n")
    broken = extended.lmcache("uptime")
    assert broken.status == 1
    assert broken.text.startswith("lmcache: `uptime` cannot be loaded")
    assert extended.lmcache("-h").status == 0
    assert extended.lmcache("ping", "kvcache", "--url", "127.0.0.1:1", "-q").status == 1
