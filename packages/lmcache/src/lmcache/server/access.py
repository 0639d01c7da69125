"""Tokens of the HTTP API: how they are read, which role each has, and how one that is presented is compared.

The server keeps digests only. A token is 256 random bits as `lmcache auth init` makes it, so one round of SHA-256 is
enough: there is nothing to guess. The file holds one token a line::

    # anything after a number sign
    read  sha256:64 hexadecimal digits
    admin sha256:64 hexadecimal digits

Several tokens may have one role, which is how they are exchanged without a gap.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass, field
from enum import IntEnum

from lmcache.errors import ConfigError
from lmcache.system import read_private

FILE_BYTES_MAX = 64 << 10
TOKENS_MAX = 64
TOKEN_CHARS_MIN = 32

_LINE = re.compile(r"(read|write|admin)\s+sha256:([0-9a-f]{64})")
_BEARER = re.compile(rb"bearer +([\x21-\x7e]+)", re.IGNORECASE)


class Role(IntEnum):
    """What a token allows; each role may do what those below it may."""

    READ = 1
    WRITE = 2
    ADMIN = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Token:
    """A role, and the SHA-256 of what opens it."""

    role: Role
    digest: bytes = field(repr=False)


def variable(role: Role) -> str:
    """The environment variable that may carry one token of this role, to a server."""
    return f"LMCACHE_{role.name}_TOKEN"


def read_tokens(path: str | None, environment: MutableMapping[str, str]) -> tuple[Token, ...]:
    """The tokens of a file and of the environment, from which they are removed: no child process needs them.

    Raises:
        ConfigError: a file that others could read or have written, a line or a variable that is no token, two roles for
        one token. No sentence repeats a secret.
    """
    tokens = [] if path is None else _from_file(path)
    for role in Role:
        text = environment.pop(variable(role), "").strip()
        if text:
            tokens.append(Token(role, _digest(_checked(variable(role), text))))
    if len(tokens) > TOKENS_MAX:
        raise ConfigError(f"at most {TOKENS_MAX} tokens, not {len(tokens)}")
    if len({token.digest for token in tokens}) < len(tokens):
        raise ConfigError("a token is named twice, in --auth-file or the environment: each has one role")
    return tuple(tokens)


def role_of(tokens: Iterable[Token], presented: bytes) -> Role | None:
    """The role of a token, None where it is nobody's. The time it takes tells nothing about any token."""
    digest = _digest(presented)
    found = None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token.role
    return found


def bearer(values: Iterable[bytes]) -> bytes | None:
    """The token in the Authorization headers of a request: the only one, and of the scheme Bearer; else None."""
    match list(values):
        case [value] if found := _BEARER.fullmatch(value.strip()):
            return found[1]
    return None


def open_private(path: str, option: str, bytes_max: int = FILE_BYTES_MAX) -> bytes:
    """The content of a file that holds a secret.

    Raises:
        ConfigError: it cannot be read, is no plain file or too long, or others than its owner can use it, or its owner
        is neither this user nor root.
    """
    try:
        return read_private(path, f"{option} {path}", bytes_max)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option}: cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def _from_file(path: str) -> list[Token]:
    try:
        text = open_private(path, "--auth-file").decode("ascii")
    except UnicodeDecodeError:
        raise ConfigError(f"--auth-file {path} holds characters that are not ASCII") from None
    tokens = []
    for number, line in enumerate(text.splitlines(), 1):
        rule = line.partition("#")[0].strip()
        if not rule:
            continue
        found = _LINE.fullmatch(rule)
        if found is None:
            raise ConfigError(
                f"--auth-file {path}, line {number}: expected read, write or admin and sha256:DIGEST, "
                "as `lmcache auth init` writes it"
            )
        tokens.append(Token(Role[found[1].upper()], bytes.fromhex(found[2])))
    if not tokens:
        raise ConfigError(f"--auth-file {path} holds no token: make one with `lmcache auth init`")
    return tokens


def _checked(name: str, text: str) -> bytes:
    is_sendable = text.isascii() and text.isprintable() and " " not in text
    if not is_sendable or len(text) < TOKEN_CHARS_MIN:
        raise ConfigError(f"{name} must be at least {TOKEN_CHARS_MIN} printable ASCII characters without blanks")
    return text.encode()


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
