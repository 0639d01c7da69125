"""Guard, level 1: what is installed, and what is refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lmcache_cli
from lmcache_cli import _distribution
from lmcache_cli.errors import InstallConflict

FULL, THIN = "lmcache-0.1.0", "lmcache_cli-0.2.0"


def install(folder: Path, *names: str) -> Path:
    for name in names:
        info = folder / f"{name}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\n")
    return folder


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only site folder there is; this package seems to lie in a checkout, wherever these tests really run from."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    elsewhere = [path for path in sys.path if Path(path).name not in ("site-packages", "dist-packages")]
    monkeypatch.setattr(sys, "path", [*elsewhere, str(folder)])
    monkeypatch.setattr(_distribution, "__file__", str(tmp_path / "checkout" / "lmcache_cli" / "_distribution.py"))
    return folder


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ([], {}),
        ([FULL], {"lmcache": "0.1.0"}),
        ([THIN], {"lmcache-cli": "0.2.0"}),
        ([FULL, THIN], {"lmcache": "0.1.0", "lmcache-cli": "0.2.0"}),
        (["lmcache-0.5.7rc3.dev0+cu12"], {"lmcache": "0.5.7rc3.dev0+cu12"}),
        (["lmcache_frontend-1.0", "lmcacheplus-1.0", "notlmcache-1.0"], {}),
    ],
)
def test_our_distributions_are_found_by_their_folders(site: Path, names: list[str], found: dict[str, str]) -> None:
    install(site, *names)
    assert _distribution.installed() == found


def test_what_a_cut_off_uninstall_leaves_does_not_count(site: Path) -> None:
    install(site, FULL)
    (site / f"{THIN}.dist-info").mkdir()
    _distribution.check()


def test_an_editable_full_package_alone_is_fine(site: Path) -> None:
    install(site, FULL)  # its files lie in a checkout, only this folder is in the site
    _distribution.check()


def test_both_are_a_conflict_even_in_two_site_folders(site: Path, tmp_path: Path) -> None:
    install(site, FULL)
    sys.path.append(str(install(tmp_path / "user" / "site-packages", THIN)))
    with pytest.raises(InstallConflict):
        _distribution.check()


def test_the_message_names_both_versions_and_the_commands_that_mend_it(site: Path) -> None:
    install(site, FULL, THIN)
    with pytest.raises(ImportError) as caught:
        _distribution.check()
    text = str(caught.value)
    assert "lmcache 0.1.0 and lmcache-cli 0.2.0" in text
    assert "\n    pip uninstall -y lmcache lmcache-cli\n" in text
    commands = [line.split("(")[0].strip() for line in text.splitlines() if line.startswith("    pip install")]
    assert len(commands) == 2
    assert all(command.endswith(".whl") for command in commands)  # never by a name that an index would resolve


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["--version"], ["ping", "kvcache"], ["server"], []])
def test_an_environment_with_both_refuses_every_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    shutil.copytree(Path(lmcache_cli.__file__).parent, tmp_path / "lmcache_cli")
    install(tmp_path, FULL, THIN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    command = [sys.executable, "-m", "lmcache_cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (78, "")
    assert done.stderr.startswith("lmcache: lmcache 0.1.0 and lmcache-cli 0.2.0 are both installed")
    assert "Traceback" not in done.stderr


def test_the_guard_costs_no_metadata_import(process_modules: Callable[[str], set[str]]) -> None:
    loaded = process_modules("from lmcache_cli import _distribution; _distribution.check()")
    assert not loaded & {"importlib.metadata", "click", "httpx", "rich"}
