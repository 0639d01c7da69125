"""Keys for encryption at rest: where they come from, and that nothing shows them."""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path

import pytest
from conftest import Options
from test_sealed import ONE, OTHER, key_file

from lmcache.errors import ConfigError
from lmcache.tiers import make_tier
from lmcache.tiers.options import Options as AdapterOptions
from lmcache.tiers.sealed_keys import Key, read_keys


@pytest.fixture
def plain(tmp_path: Path) -> Options:
    """Options of a tier in a folder, not sealed."""
    return {"type": "file", "base_path": str(tmp_path / "objects"), "capacity_gb": 0.25}


@pytest.fixture
def sealed(tmp_path: Path, plain: Options) -> Options:
    """The same, sealed with the key ``ONE``."""
    return {**plain, "seal": key_file(tmp_path / "one", ONE)}


def test_keys_are_hex_or_base64_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = AdapterOptions({"type": "some"})
    texts = [ONE, base64.b64encode(bytes.fromhex(OTHER)).decode()]
    monkeypatch.setenv("SEAL_KEYS", ", ".join(texts))
    for table in (key_file(tmp_path / "keys", "# two of them", *texts), {"key_env": "SEAL_KEYS"}):
        keys = read_keys(options, table)
        assert [key.secret.hex() for key in keys] == [ONE, OTHER]
        assert len({key.id for key in keys}) == 2


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o444])
def test_a_key_file_that_others_can_use_is_refused(sealed: Options, mode: int) -> None:
    os.chmod(sealed["seal"]["key_file"], mode)
    with pytest.raises(ConfigError, match="can be used by others than its owner"):
        make_tier(sealed)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        (ONE[:-2], "key 1 of"),
        (f"{ONE}\n{OTHER}00", "key 2 of"),
        (f"{ONE}\n{ONE.upper()}", "key 2 of .* is there twice"),
        ("pass phrase", "key 1 of"),
        ("\xe9" * 64, "it is not text"),
        ("# " + "x" * (65 << 10), "longer than 64 KiB"),
        ("\n".join(secrets.token_hex(32) for _ in range(17)), "more than 16 keys"),
    ],
)
def test_what_is_wrong_with_a_key_file_is_one_sentence_that_shows_no_key(
    sealed: Options, content: str, reason: str
) -> None:
    Path(sealed["seal"]["key_file"]).write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=reason) as raised:
        make_tier(sealed)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert "--l2-adapter 'file'" in sentence
    assert not any(secret[:16].lower() in sentence.lower() for secret in content.split() if len(secret) >= 16)


@pytest.mark.parametrize(
    ("seal", "reason"),
    [
        ({}, "either a key_file or a key_env"),
        ({"key_file": "a", "key_env": "B"}, "either a key_file or a key_env"),
        ({"key_file": "a", "more": 1}, "either a key_file or a key_env"),
        ({"key": ONE}, "process list"),
        ({"key_file": 7}, "'key_file' is a string"),
        ({"key_file": "/absent/key"}, "cannot be read: No such file"),
        ({"key_file": "/dev/null"}, "no plain file"),
        ({"key_file": "\0"}, "cannot be read"),
        ({"key_env": "NO_SUCH_VARIABLE"}, "'NO_SUCH_VARIABLE' is not set"),
        (True, "'seal' is an object"),
    ],
)
def test_what_is_wrong_with_the_option_is_one_sentence(plain: Options, seal: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        make_tier({**plain, "seal": seal})
    assert "\n" not in str(raised.value)
    assert ONE not in str(raised.value)


def test_a_key_does_not_show_in_what_is_printed() -> None:
    secret = bytes.fromhex(ONE)
    shown = repr([Key(b"\0" * 4, secret)])
    assert ONE not in shown
    assert repr(secret)[2:-1] not in shown
