"""`--output`, and a stdout that is not what one hopes."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import STATUS
from serving import json_answer, serve

Run = Callable[..., Any]
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions and devices")


@pytest.fixture
def describe(lmcache: Run) -> Run:
    def run(*words: str) -> Any:
        with serve({"/status": json_answer(STATUS)}) as server:
            ended = lmcache("describe", "kvcache", "--url", server.url, *words)
        return ended, len(server.asked)

    return run


@pytest.mark.parametrize("form", ["terminal", "json"])
def test_the_file_gets_what_stdout_gets(describe: Run, tmp_path: Path, form: str) -> None:
    target = tmp_path / "status"
    ended, _ = describe("--format", form, "--output", str(target))
    assert ended.status == 0
    assert target.read_text(encoding="utf-8") == ended.out != ""
    assert os.listdir(tmp_path) == ["status"]


def test_quiet_still_writes_the_file(describe: Run, tmp_path: Path) -> None:
    target = tmp_path / "status.json"
    ended, _ = describe("-q", "--format", "json", "--output", str(target))
    assert (ended.status, ended.out) == (0, "")
    assert json.loads(target.read_text())["metrics"]["health"] == "OK"


@posix
def test_a_file_is_replaced_as_a_whole_and_keeps_its_permissions(describe: Run, tmp_path: Path) -> None:
    target, link = tmp_path / "status", tmp_path / "link"
    target.write_text("old")
    target.chmod(0o640)
    reader = target.open()
    link.symlink_to(target)
    describe("--output", str(link))
    with reader:
        assert reader.read() == "old"
    assert target.read_text().startswith("====")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert link.is_symlink()


@posix
def test_a_new_file_has_the_permissions_of_any_new_file(describe: Run, tmp_path: Path) -> None:
    describe("--output", str(tmp_path / "status"))
    (tmp_path / "other").touch()
    assert (tmp_path / "status").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("path", ["missing/folder/file", "."])
def test_a_path_that_cannot_be_written_is_one_line_and_costs_no_request(
    describe: Run, tmp_path: Path, path: str
) -> None:
    ended, num_asked = describe("--output", str(tmp_path / path))
    assert (ended.status, ended.out, num_asked) == (2, "", 0)
    assert ended.err.startswith(f"lmcache: cannot write --output {tmp_path / path}: ")
    assert ended.err.count("\n") == 1


@posix
def test_a_file_without_write_permission_is_refused(describe: Run, tmp_path: Path) -> None:
    target = tmp_path / "status"
    target.touch(0o400)
    if os.access(target, os.W_OK):  # root may write anywhere, except into what the kernel makes up
        target = Path("/proc/version")
    ended, num_asked = describe("--output", str(target))
    assert (ended.status, num_asked) == (2, 0)


def test_a_failed_command_leaves_the_old_file_alone(lmcache: Run, tmp_path: Path) -> None:
    target = tmp_path / "status"
    target.write_text("old")
    assert lmcache("describe", "kvcache", "--url", "127.0.0.1:1", "--output", str(target)).status == 1
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["status"]


def test_a_failed_command_in_json_saves_its_document(lmcache: Run, tmp_path: Path) -> None:
    target = tmp_path / "status"
    ended = lmcache("describe", "kvcache", "--url", "127.0.0.1:1", "--format", "json", "--output", str(target))
    assert ended.status == 1
    assert target.read_text() == ended.out
    assert json.loads(ended.out)["error"]["code"] == "unreachable"


@posix
def test_a_device_is_written_not_replaced(describe: Run) -> None:
    ended, _ = describe("--output", "/dev/null")
    assert ended.status == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def shell(script: str, url: str) -> subprocess.CompletedProcess[str]:
    command = f'"{sys.executable}" -m lmcache_cli describe kvcache --url {url}'
    return subprocess.run(["sh", "-c", script.replace("CMD", command)], capture_output=True, text=True, timeout=60)


@posix
def test_a_reader_that_went_away_is_no_complaint(tmp_path: Path) -> None:
    with serve({"/status": json_answer(STATUS)}) as server:
        done = shell(f"{{ CMD --output {tmp_path / 'x'}; echo $? >&2; }} | exec true", server.url)
    assert done.stderr in ("1\n", "0\n")  # 0 where it wrote before the reader was gone
    assert (tmp_path / "x").read_text().startswith("====")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_is_one_line() -> None:
    with serve({"/status": json_answer(STATUS)}) as server:
        done = shell("CMD > /dev/full", server.url)
    assert (done.returncode, done.stderr) == (1, "lmcache: No space left on device\n")


@posix
def test_a_closed_stdout_is_no_complaint() -> None:
    with serve({"/status": json_answer(STATUS)}) as server:
        done = shell("CMD >&-", server.url)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_name_that_the_locale_cannot_write_is_escaped(process: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    document = {"is_healthy": True, "engine_type": "模"}
    with serve({"/status": json_answer(document)}) as server:
        ended = process("describe", "kvcache", "--url", server.url)
    assert ended.status == 0
    assert "\\u6a21" in ended.out
