"""The key of tenants' digests: made once, for this user alone, and never guessed at when it is damaged."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lmcache.errors import ConfigError
from lmcache.keys import TENANT_BYTES, TENANT_SECRET_BYTES, tenant_id
from lmcache.server.tenant_secret import NAME, tenant_secret
from lmcache.system import SystemEntropy


def test_it_is_made_once_and_kept_for_its_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "5555"
    secret = tenant_secret(str(folder), SystemEntropy())
    assert len(secret) == TENANT_SECRET_BYTES
    assert stat.S_IMODE((folder / NAME).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert tenant_secret(str(folder), SystemEntropy()) == secret
    assert os.listdir(folder) == [NAME]


def test_another_instance_has_another(tmp_path: Path) -> None:
    assert tenant_secret(str(tmp_path / "a"), SystemEntropy()) != tenant_secret(str(tmp_path / "b"), SystemEntropy())


@pytest.mark.parametrize("content", [b"", b"x" * (TENANT_SECRET_BYTES - 1), b"x" * (TENANT_SECRET_BYTES + 1)])
def test_a_file_of_another_length_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / NAME
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=NAME):
        tenant_secret(str(tmp_path), SystemEntropy())
    assert path.read_bytes() == content


def test_a_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / NAME
    path.write_bytes(bytes(TENANT_SECRET_BYTES))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="chmod 600"):
        tenant_secret(str(tmp_path), SystemEntropy())


def test_a_place_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    secret = tenant_secret(str(tmp_path / "file" / "below"), SystemEntropy())
    assert len(secret) == TENANT_SECRET_BYTES
    assert "cannot keep" in caplog.text


def test_the_digest_of_a_salt_depends_on_the_key_and_no_salt_has_none() -> None:
    first, second = bytes(TENANT_SECRET_BYTES), b"\1" * TENANT_SECRET_BYTES
    assert tenant_id("", first) == bytes(TENANT_BYTES)
    assert len({tenant_id(salt, key) for salt in ("alice", "bob") for key in (first, second)}) == 4
    assert tenant_id("alice", first) == tenant_id("alice", first)
