"""What lies in the wheels."""

from __future__ import annotations

import configparser
import hashlib
import os
import re
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Environment, Wheel

ROOT = Path(__file__).resolve().parents[2]
THIN_REQUIRES = {"click", "httpx", "rich"}
SYSTEM_LIBRARIES = re.compile(r"lib(c|m|stdc\+\+|gcc_s)\.so\.\d+|ld-linux[-\w]*\.so\.\d+")


def required(wheel: Wheel) -> set[str]:
    """Requires-Dist lines without those of extras."""
    lines = wheel.metadata.get_all("Requires-Dist") or []
    return {line for line in lines if "extra ==" not in line}


def entry_points(wheel: Wheel) -> dict[str, dict[str, str]]:
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(wheel.info("entry_points.txt"))
    return {section: dict(parser[section]) for section in parser.sections()}


def command_line_of(wheel: Wheel) -> dict[str, str]:
    return {
        name: hashlib.sha256(wheel.read(name)).hexdigest() for name in wheel.names if name.startswith("lmcache_cli/")
    }


def needed_libraries(elf: bytes) -> set[str]:
    """DT_NEEDED entries of a 64-bit little-endian ELF file (System V ABI, chapters 4 and 5)."""
    assert elf[:6] == b"\x7fELF\x02\x01"
    (sections_at,) = struct.unpack_from("<Q", elf, 0x28)
    entry_bytes, num_sections = struct.unpack_from("<HH", elf, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", elf, sections_at + index * entry_bytes) for index in range(num_sections)
    ]
    needed = set()
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind == 6:  # SHT_DYNAMIC; its link is the section with its strings
            strings_at = sections[link][4]
            for tag, value in struct.iter_unpack("<qQ", elf[offset : offset + size]):
                if tag == 1:  # DT_NEEDED
                    start = strings_at + value
                    needed.add(elf[start : elf.index(b"\0", start)].decode())
    return needed


def test_the_thin_wheel_fits_every_platform(thin: Wheel) -> None:
    assert thin.path.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in thin.info("WHEEL")


def test_the_thin_wheel_is_small(thin: Wheel) -> None:
    assert thin.path.stat().st_size < 300 * 1024


def test_the_thin_wheel_holds_the_command_line_and_nothing_else(thin: Wheel) -> None:
    assert {name.split("/")[0] for name in thin.names} == {"lmcache_cli", f"lmcache_cli-{thin.version}.dist-info"}
    assert not [name for name in thin.names if re.search(r"\.(so|pyd|dylib|pyc)$", name)]


def test_the_thin_wheel_requires_three_packages(thin: Wheel) -> None:
    assert {re.split(r"[^\w.-]", line)[0] for line in required(thin)} == THIN_REQUIRES


def test_the_full_wheel_asks_for_the_command_lines_packages_in_the_same_words(thin: Wheel, full: Wheel) -> None:
    assert required(thin) < required(full)


def test_both_wheels_hold_the_same_command_line_byte_for_byte(thin: Wheel, full: Wheel) -> None:
    assert command_line_of(thin) == command_line_of(full)
    assert "lmcache_cli/__main__.py" in command_line_of(thin)


def test_every_source_file_is_in_the_full_wheel(full: Wheel) -> None:
    for source in (ROOT / "packages/lmcache/src", ROOT / "packages/lmcache-cli/src"):
        files = [path for path in source.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so")]
        missing = {str(path.relative_to(source)) for path in files} - set(full.names)
        assert not missing


def test_the_full_wheel_holds_no_sources_of_the_copy_engine_and_no_tests(full: Wheel) -> None:
    roots = {name.split("/")[0] for name in full.names}
    assert roots == {"lmcache", "lmcache_cli", f"lmcache-{full.version}.dist-info"}


def test_the_copy_engine_needs_only_the_c_and_cpp_runtimes(full: Wheel) -> None:
    (name,) = [name for name in full.names if name.endswith(".so")]
    assert name.startswith("lmcache/transfer/_native.")
    needed = needed_libraries(full.read(name))
    assert needed
    assert {library for library in needed if not SYSTEM_LIBRARIES.fullmatch(library)} == set()


def test_the_entry_points_differ_by_the_commands_that_need_the_runtime(thin: Wheel, full: Wheel) -> None:
    more = entry_points(full)
    assert set(more.pop("lmcache.commands")) == {"bench.server", "bench.tier", "demo", "engine", "server"}
    assert more == entry_points(thin) == {"console_scripts": {"lmcache": "lmcache_cli.__main__:main"}}


def test_both_wheels_and_the_changelog_agree_on_the_version(thin: Wheel, full: Wheel) -> None:
    newest = re.search(r"^## \[?(\d[^\]\s]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert thin.version == full.version == newest[1]


def test_every_module_of_the_thin_wheel_imports_where_heavy_packages_are_forbidden(
    thin: Wheel, environment: Callable[..., Environment]
) -> None:
    modules = [
        name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name in thin.names
        if name.startswith("lmcache_cli/") and name.endswith(".py")
    ]
    code = f"""
import importlib, sys
FORBIDDEN = {{"torch", "numpy", "zmq", "msgspec", "fastapi", "uvicorn", "psutil", "prometheus_client", "lmcache"}}
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in FORBIDDEN:
            raise ImportError(f"{{name}} is forbidden here")
sys.meta_path.insert(0, Forbid())
for module in {modules!r}:
    importlib.import_module(module)
print(len({modules!r}), "imported")
"""
    answer = environment(thin).run(code)
    assert answer.text.strip() == f"{len(modules)} imported"


def test_sdists_hold_what_a_build_needs_and_no_leftovers(sdists: list[Path]) -> None:
    for sdist in sdists:
        listing = subprocess.run(["tar", "-tzf", str(sdist)], check=True, capture_output=True, text=True).stdout.split()
        leftovers = [name for name in listing if re.search(r"__pycache__|\.pyc$|\.so$|/tests/(unit|cli)|/\.nox", name)]
        assert leftovers == []
        assert [name for name in listing if name.endswith("lmcache_cli/_version.py")]


@pytest.mark.parametrize("project", [".", "packages/lmcache-cli"])
def test_a_wheel_from_the_checkout_holds_the_same_files_as_one_from_the_sdist(
    project: str, thin: Wheel, full: Wheel, build_python: Path, tmp_path: Path
) -> None:
    command = [build_python, "-m", "build", "--no-isolation", "--wheel", f"--outdir={tmp_path}", ROOT / project]
    path = f"{build_python.parent}:{os.environ['PATH']}"  # cmake and ninja lie beside that Python
    done = subprocess.run(command, capture_output=True, text=True, timeout=170, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert set(archive.namelist()) == set((full if project == "." else thin).names)
