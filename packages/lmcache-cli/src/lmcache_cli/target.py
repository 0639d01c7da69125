"""Where a request goes and with what: address, deadline, headers, trust; one for each server that is asked."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lmcache_cli._version import __version__
from lmcache_cli.errors import UsageFault

if TYPE_CHECKING:
    import ssl

HEADER_FILE_BYTES_MAX = 64 << 10

_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True)
class Target:
    """One server as the command line describes it.

    Attributes:
        url: in the normal form of ``urls.base_url``.
        timeout_s: longest wait for an answer (of a stream: for its next bytes).
        headers: sent with every request, the key among them; never shown.
        cacert: file of the authorities to trust instead of the system's.
        insecure: whether any certificate will do.
    """

    url: str
    timeout_s: float = 10.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    cacert: str | None = None
    insecure: bool = False

    def all_headers(self) -> dict[str, str]:
        """``headers``, and who we are."""
        return {"User-Agent": f"lmcache-cli/{__version__}", **self.headers}

    def ssl_context(self) -> ssl.SSLContext:
        """The trust that the options ask for; by default the system's authorities, as curl and the browser use them.

        Raises:
            UsageFault: the file of authorities cannot be read.
        """
        import ssl

        try:
            context = ssl.create_default_context(cafile=self.cacert)
        except OSError as error:  # ssl.SSLError is one
            reason = error.strerror if not isinstance(error, ssl.SSLError) else "it holds no PEM certificates"
            raise UsageFault(f"cannot use --cacert {self.cacert}: {reason}") from error
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def cache_server_key() -> dict[str, str]:
    """What authenticates us to a cache server: the token in LMCACHE_TOKEN, or in the file that LMCACHE_TOKEN_FILE
    names. Never sent to an engine.

    Raises:
        UsageFault: the file cannot be read, or no header can carry the token.
    """
    path = os.environ.get("LMCACHE_TOKEN_FILE", "")
    key = _bearer("LMCACHE_TOKEN")
    if key or not path:
        return key
    token = _read("LMCACHE_TOKEN_FILE", path)
    if not token or not _is_sendable(token):
        raise UsageFault(f"LMCACHE_TOKEN_FILE: {path} holds no token")
    return {"Authorization": f"Bearer {token}"}


def engine_key() -> dict[str, str]:
    """What authenticates us to an engine: the key in OPENAI_API_KEY. Never sent to a cache server."""
    return _bearer("OPENAI_API_KEY")


def read_headers(items: Sequence[str]) -> dict[str, str]:
    """Headers of `--header NAME=VALUE`, or NAME=@FILE, which keeps a secret out of the list of processes.

    Raises:
        UsageFault: no such form, or the file cannot be read; the value is not repeated in the sentence.
    """
    headers = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not _NAME.fullmatch(name):
            raise UsageFault("--header: expected NAME=VALUE or NAME=@FILE")
        if value.startswith("@"):
            value = _read(f"--header {name}", value[1:])
        if not _is_sendable(value):
            raise UsageFault(f"--header {name}: the value holds characters that a header cannot carry")
        headers[name] = value
    return headers


def _bearer(variable: str) -> dict[str, str]:
    value = os.environ.get(variable, "").strip()
    if not value:
        return {}
    if not _is_sendable(value):
        raise UsageFault(f"{variable} holds characters that a header cannot carry")
    return {"Authorization": f"Bearer {value}"}


def _is_sendable(value: str) -> bool:
    return value.isascii() and (value.isprintable() or value == "")


def _read(source: str, path: str) -> str:
    try:
        with open(path, "rb") as file:
            content = file.read(HEADER_FILE_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageFault(f"{source}: cannot read {path}: {reason}") from error
    if len(content) > HEADER_FILE_BYTES_MAX:
        raise UsageFault(f"{source}: {path} is longer than {HEADER_FILE_BYTES_MAX >> 10} KiB")
    try:
        return content.decode("ascii").strip()
    except UnicodeDecodeError as error:
        raise UsageFault(f"{source}: {path} holds characters that a header cannot carry") from error
