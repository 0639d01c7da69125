"""Level 2 of the guard: what a user sees when both wheels meet in one environment, in whatever order."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Environment, Wheel

ROOT = Path(__file__).resolve().parents[2]
CONFLICT = 78
MakeEnvironment = Callable[..., Environment]


def works(environment: Environment, wheel: Wheel) -> None:
    answer = environment.lmcache("--version")
    assert answer.status == 0, answer.text
    assert wheel.version in answer.text


def imports_runtime(environment: Environment) -> None:
    answer = environment.run("import lmcache; print(lmcache.__version__)")
    assert answer.status == 0, answer.text


def refuses(environment: Environment, thin: Wheel, full: Wheel) -> None:
    command = environment.lmcache("--version")
    assert command.status == CONFLICT
    imported = environment.run("import lmcache")
    assert imported.status == 1
    assert "Error" in imported.text
    for answer in (command, imported):
        assert f"lmcache {full.version}" in answer.text
        assert f"lmcache-cli {thin.version}" in answer.text
        assert "pip uninstall -y lmcache lmcache-cli" in answer.text
        assert "pip install" in answer.text
        # by bare name the index would answer with somebody else's package
        assert not re.search(r"pip install (-\S+ )*lmcache(-cli)?\s*$", answer.text, re.MULTILINE)


def follow_the_advice(environment: Environment, wheel: Wheel) -> None:
    environment.pip("uninstall", "-y", "lmcache", "lmcache-cli")
    environment.pip("install", wheel.path)


@pytest.fixture(params=["thin, then full", "full, then thin", "both in one call"])
def both(request: pytest.FixtureRequest, environment: MakeEnvironment, thin: Wheel, full: Wheel) -> Environment:
    """An environment that held one of the wheels, worked, and then got the other."""
    if request.param == "both in one call":
        made = environment()
        made.pip("install", thin.path, full.path)
        return made
    first, second = (thin, full) if request.param.startswith("thin") else (full, thin)
    made = environment(first)
    works(made, first)
    made.pip("install", second.path)
    return made


def test_both_wheels_together_refuse_to_run_and_say_how_to_mend_it(both: Environment, thin: Wheel, full: Wheel) -> None:
    refuses(both, thin, full)


def test_following_the_advice_mends_it(both: Environment, full: Wheel) -> None:
    follow_the_advice(both, full)
    works(both, full)
    imports_runtime(both)


def test_after_removing_thin_the_runtime_says_how_to_repair_it(both: Environment, full: Wheel) -> None:
    both.pip("uninstall", "-y", "lmcache-cli")
    assert not both.has_command()
    answer = both.run("import lmcache")
    assert answer.status == 1
    assert f"this install of lmcache {full.version} is incomplete" in answer.text
    assert "python -m pip uninstall -y lmcache lmcache-cli" in answer.text
    assert f"python -m pip install lmcache-{full.version}-*.whl" in answer.text
    follow_the_advice(both, full)
    works(both, full)
    imports_runtime(both)


def test_after_removing_full_nothing_of_ours_is_left_to_speak_until_thin_is_installed_again(
    both: Environment, thin: Wheel
) -> None:
    both.pip("uninstall", "-y", "lmcache")
    assert not both.has_command()
    assert "No module named 'lmcache'" in both.run("import lmcache").text
    assert "No module named 'lmcache_cli'" in both.run("import lmcache_cli").text
    follow_the_advice(both, thin)
    works(both, thin)


def test_each_wheel_alone_works(environment: MakeEnvironment, thin: Wheel, full: Wheel) -> None:
    works(environment(thin, name="thin"), thin)
    alone = environment(full, name="full")
    works(alone, full)
    imports_runtime(alone)


def test_importing_the_runtime_loads_nothing_heavy(environment: MakeEnvironment, full: Wheel) -> None:
    heavy = {"torch", "zmq", "msgspec", "fastapi", "click", "rich", "httpx", "importlib.metadata"}
    answer = environment(full).run(f"import sys, lmcache; print(sorted({heavy!r} & set(sys.modules)))")
    assert answer.text.strip() == "[]"


def test_the_full_wheel_has_the_server_and_the_thin_one_says_in_one_line_where_it_is(
    environment: MakeEnvironment, thin: Wheel, full: Wheel
) -> None:
    assert environment(full, name="full").lmcache("server", "--help").status == 0
    answer = environment(thin, name="thin").lmcache("server", "--port", "5555")
    assert answer.status == 2
    assert answer.text.count("\n") == 1
    assert "`server` needs the full package" in answer.text


@pytest.mark.parametrize("project", [".", "packages/lmcache-cli"])
def test_an_editable_install_works(
    project: str, environment: MakeEnvironment, thin: Wheel, build_python: Path, tmp_path: Path
) -> None:
    made = environment()
    (site,) = made.folder.glob("lib/python*/site-packages")
    # building without isolation needs the build requirements on the path
    build_site = next(build_python.parent.parent.glob("lib/python*/site-packages"))
    (site / "build.pth").write_text(f"{build_site}\n")
    options = ["--no-build-isolation", f"--config-settings=build-dir={tmp_path / 'build'}"] if project == "." else []
    made.pip("install", "--no-build-isolation", *options, "--editable", ROOT / project)
    works(made, thin)
    where = made.run("import lmcache_cli; print(lmcache_cli.__file__)").text
    assert where.startswith(str(ROOT / "packages" / "lmcache-cli" / "src"))
    if project == ".":
        answer = made.run("from lmcache.transfer import _native; print(_native.features())")
        assert answer.status == 0, answer.text


def test_run_explains_itself_and_exits_2_when_it_is_not_told_what_to_do() -> None:
    for words in ([], ["something"]):
        answer = subprocess.run([str(ROOT / "run"), *words], capture_output=True, text=True, timeout=20)
        assert answer.returncode == 2
        assert "usage: ./run demo | ./run demo-vllm | ./run test" in answer.stderr
