"""Keys that objects are sealed with, from a file or the environment."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lmcache.errors import ConfigError
from lmcache.system import read_private
from lmcache.tiers.options import Options

KEY_BYTES, KEY_ID_BYTES = 32, 4
KEYS_MAX = 16
FILE_BYTES_MAX = 64 << 10

_HEX = re.compile(r"[0-9a-fA-F]{64}")
_FORM = "a key is 32 bytes as 64 hex digits or in base64, as `openssl rand -hex 32` makes one"


@dataclass(frozen=True, slots=True, repr=False)
class Key:
    """32 secret bytes. ``id`` tells which key sealed an object; it may be seen, and does not help to find the key."""

    id: bytes
    secret: bytes


def read_keys(options: Options, table: Mapping[str, object]) -> tuple[Key, ...]:
    """The keys that the option ``seal`` of an adapter names: the first one seals, all of them open.

    Args:
        options: the adapter's, for its name in errors.
        table: {"key_file": PATH}, with a key a line, or {"key_env": NAME}, with keys separated by spaces or commas.

    Raises:
        ConfigError: one sentence, which never repeats what was read.
    """
    names = sorted(table)
    if "key" in names:
        raise options.error("a key in 'seal' would be seen in the process list: give key_file or key_env instead")
    if names not in (["key_env"], ["key_file"]):
        raise options.error("'seal' has either a key_file or a key_env, and nothing else")
    value = table[names[0]]
    if not isinstance(value, str):
        raise options.error(f"{names[0]!r} is a string")
    if names == ["key_file"]:
        lines = [line.partition("#")[0].strip() for line in _private_text(options, value).splitlines()]
        return _keys(options, f"key_file {value!r}", filter(None, lines))
    found = os.environ.get(value)
    if found is None:
        raise options.error(f"the environment variable {value!r} is not set")
    return _keys(options, f"the environment variable {value!r}", found.replace(",", " ").split())


def _keys(options: Options, place: str, texts: Iterable[str]) -> tuple[Key, ...]:
    keys: dict[bytes, Key] = {}
    for number, text in enumerate(texts, 1):
        secret = _secret(text)
        if secret is None:
            raise options.error(f"key {number} of {place} is none: {_FORM}")
        identity = hashlib.sha256(secret).digest()[:KEY_ID_BYTES]
        if identity in keys:
            raise options.error(f"key {number} of {place} is there twice")
        if number > KEYS_MAX:
            raise options.error(f"{place} holds more than {KEYS_MAX} keys")
        keys[identity] = Key(identity, secret)
    if not keys:
        raise options.error(f"{place} holds no key: {_FORM}")
    return tuple(keys.values())


def _secret(text: str) -> bytes | None:
    if _HEX.fullmatch(text):
        return bytes.fromhex(text)
    try:
        secret = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return secret if len(secret) == KEY_BYTES else None


def _private_text(options: Options, path: str) -> str:
    """The content of a file that only its owner, who is this user or root, can use."""
    try:
        return read_private(path, f"key_file {path!r}", FILE_BYTES_MAX).decode("ascii")
    except ConfigError as error:
        raise options.error(str(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise options.error(f"key_file {path!r} cannot be read: {reason}") from None
