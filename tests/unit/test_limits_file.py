from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.server.limits_file import FILE_BYTES_MAX, LimitsFile, state_folder

LIMITS = {"": 1.5, "team a": 0.0, "größe/😀": 1e6}


def test_limits_come_back_as_they_were_kept(tmp_path: Path) -> None:
    folder = str(tmp_path / "state" / "lmcache" / "5555")
    LimitsFile(folder).save(LIMITS)
    assert LimitsFile(folder).load() == LIMITS
    LimitsFile(folder).save({})
    assert LimitsFile(folder).load() == {}


def test_where_nothing_was_kept_there_are_no_limits_and_no_folder_is_made(tmp_path: Path) -> None:
    assert LimitsFile(str(tmp_path / "a" / "b")).load() == {}
    assert list(tmp_path.iterdir()) == []


def test_the_file_and_its_folders_are_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        LimitsFile(str(tmp_path / "lmcache" / "name")).save(LIMITS)
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in sorted(tmp_path.rglob("*"))]
    assert modes == [0o700, 0o700, 0o600]


def test_a_file_half_written_by_a_killed_server_does_not_matter(tmp_path: Path) -> None:
    file = LimitsFile(str(tmp_path))
    file.save(LIMITS)
    Path(f"{file.path}.new").write_text('{"vers')
    assert file.load() == LIMITS
    file.save({"b": 1.0})
    assert file.load() == {"b": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["quotas.json"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"version": 2, "limits_gb": {}}',
        b'{"version": 1, "limits_gb": []}',
        b'{"version": 1, "limits_gb": {"a": true}}',
        b'{"version": 1, "limits_gb": {"a": "1"}}',
        b'{"version": 1, "limits_gb": {"a": -1}}',
        b'{"version": 1, "limits_gb": {"a": NaN}}',
        b'{"version": 1, "limits_gb": {"a": 1e999}}',
        b'{"version": 1, "limits_gb": {"a": 1' + b"0" * 400 + b"}}",
        b'{"version": 1, "limits_gb": {"\\ud800": 1}}',
        json.dumps({"version": 1, "limits_gb": {"s" * 257: 1}}).encode(),
        json.dumps({"version": 1, "limits_gb": dict.fromkeys(map(str, range(1025)), 1)}).encode(),
        b'{"version": 1, "limits_gb": {}}' + b" " * FILE_BYTES_MAX,
    ],
)
def test_a_file_that_is_not_understood_is_an_error_that_names_it(tmp_path: Path, content: bytes) -> None:
    file = LimitsFile(str(tmp_path))
    Path(file.path).write_bytes(content)
    Path(file.path).chmod(0o600)
    with pytest.raises(ConfigError, match=r"quotas\.json does not hold limits of tenants: .*; mend or remove it"):
        file.load()


def test_a_file_that_others_can_write_or_that_is_a_link_is_not_trusted(tmp_path: Path) -> None:
    file = LimitsFile(str(tmp_path))
    file.save(LIMITS)
    Path(file.path).chmod(0o620)
    with pytest.raises(ConfigError, match="is not a file that this user alone can write"):
        file.load()
    Path(file.path).rename(tmp_path / "elsewhere")
    Path(file.path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot read the limits of tenants"):
        file.load()
    file.save({"b": 1.0})
    assert not Path(file.path).is_symlink()
    assert json.loads((tmp_path / "elsewhere").read_bytes())["limits_gb"] == LIMITS


def test_where_the_folder_cannot_be_written_keeping_and_reading_are_errors_that_say_why(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    file = LimitsFile(str(tmp_path / "taken" / "lmcache" / "name"))
    with pytest.raises(ConfigError, match=r"cannot keep the limits of tenants in .*quotas\.json: Not a directory"):
        file.save(LIMITS)
    with pytest.raises(ConfigError, match=r"cannot read the limits of tenants in .*quotas\.json: Not a directory"):
        file.load()


def test_limits_that_cannot_take_their_place_leave_what_is_there(tmp_path: Path) -> None:
    file = LimitsFile(str(tmp_path))
    Path(file.path).mkdir()
    (Path(file.path) / "kept").touch()
    with pytest.raises(ConfigError, match="cannot keep the limits of tenants"):
        file.save(LIMITS)
    assert (Path(file.path) / "kept").exists()
    with pytest.raises(ConfigError, match="is not a file that this user alone can write"):
        file.load()


def test_the_folder_follows_the_variable_if_it_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert state_folder("5555") == "/var/state/lmcache/5555"
    for value in ("", "state"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert state_folder("name") == "/home/somebody/.local/state/lmcache/name"
