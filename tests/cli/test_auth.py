"""`lmcache auth init`, and the token that the command line takes from a file."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from documents import STATUS
from serving import json_answer, serve

Run = Callable[..., Any]
ROLES = ("read", "write", "admin")


@pytest.fixture(autouse=True)
def _no_token_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LMCACHE_TOKEN_FILE", raising=False)


def test_a_token_is_made_for_each_role_and_none_is_shown(lmcache: Run, tmp_path: Path) -> None:
    folder = tmp_path / "auth"
    before = os.umask(0)
    try:
        ended = lmcache("auth", "init", "--out", str(folder))
    finally:
        os.umask(before)
    assert (ended.status, ended.err) == (0, "")
    assert {path.name for path in folder.iterdir()} == {"server", *(f"{role}.token" for role in ROLES)}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    tokens = {role: (folder / f"{role}.token").read_text().strip() for role in ROLES}
    assert len(set(tokens.values())) == 3
    rules = dict(line.split()[:2] for line in (folder / "server").read_text().splitlines())
    for role, token in tokens.items():
        assert token.startswith(f"lmc_{role}_")
        assert len(token) >= len(f"lmc_{role}_") + 43  # 256 bits, 6 a letter
        assert rules[role] == f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
        assert token not in ended.out + (folder / "server").read_text()
    assert f"--auth-file {folder}/server" in ended.out
    assert [f"LMCACHE_TOKEN_FILE={folder}/{role}.token" in ended.out for role in ROLES] == [True] * 3


def test_no_two_runs_make_the_same_tokens(lmcache: Run, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert lmcache("auth", "init", "--out", str(tmp_path / name)).status == 0
    for name in ("server", *(f"{role}.token" for role in ROLES)):
        assert (tmp_path / "one" / name).read_text() != (tmp_path / "two" / name).read_text()


@pytest.mark.parametrize("kind", ["tokens", "file", "link", "broken link"])
def test_what_is_there_already_is_left_as_it_is(lmcache: Run, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "auth"
    if kind == "tokens":
        assert lmcache("auth", "init", "--out", str(place)).status == 0
    elif kind == "file":
        place.write_text("mine")
    else:
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    ended = lmcache("auth", "init", "--out", str(place))
    assert (ended.status, ended.out) == (2, "")
    assert "exists already and is left as it is" in ended.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_empty_folder_is_filled_even_the_one_we_are_in(
    lmcache: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert lmcache("auth", "init", "--out", "empty").status == 0
    assert (tmp_path / "empty" / "server").exists()
    assert lmcache("auth", "init").status == 0
    assert (tmp_path / "lmcache-auth" / "server").exists()


@pytest.mark.parametrize("place", ["/nowhere/at/all/auth", "/proc/self/auth", "a\0b"])
def test_a_place_that_cannot_be_written_gets_one_line(lmcache: Run, place: str) -> None:
    ended = lmcache("auth", "init", "--out", place)
    assert (ended.status, ended.out, ended.err.count("\n")) == (2, "", 1)


# --- the token of a file


def test_the_token_of_a_file_goes_to_the_cache_server_and_the_variable_wins(
    lmcache: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("of-the-file\n")
    monkeypatch.setenv("LMCACHE_TOKEN_FILE", str(tmp_path / "token"))
    with serve({"/status": json_answer(STATUS), "/health": json_answer({})}) as server:
        assert lmcache("describe", "kvcache", "--url", server.url).status == 0
        monkeypatch.setenv("LMCACHE_TOKEN", "of-the-variable")
        assert lmcache("describe", "kvcache", "--url", server.url).status == 0
        assert lmcache("ping", "engine", "--url", server.url).status == 0
    sent = [asked.headers.get("authorization") for asked in server.asked]
    assert sent == ["Bearer of-the-file", "Bearer of-the-variable", None]


@pytest.mark.parametrize(("content", "sentence"), [(None, "cannot read"), ("", "no token"), ("sec\rret", "no token")])
def test_a_file_without_a_token_is_refused_without_being_shown(
    lmcache: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None, sentence: str
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("LMCACHE_TOKEN_FILE", str(path))
    ended = lmcache("ping", "kvcache", "--url", "127.0.0.1:1")
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert f"LMCACHE_TOKEN_FILE: {'cannot read ' if content is None else ''}{path}" in ended.err
    assert sentence in ended.err
    assert "ret" not in ended.err.replace(str(path), "")
