"""Prompts with placeholders: `{name}` stands for a document, `{lmcache}` for the one that comes with this package.

Only `{word}` of letters, digits and underscores is a placeholder, so JSON in a prompt survives; documents are
inserted as they are, braces included.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmcache_cli.errors import UsageFault

BUNDLED = "lmcache"
DOCUMENT_BYTES_MAX = 64 << 20

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def read(source: str) -> str:
    """The text that an argument names: `-` is stdin, `@FILE` a file, `@@...` a text that begins with @, else itself.

    Raises:
        UsageFault: it cannot be read, is too long, or is not UTF-8.
    """
    if source == "-":
        return _decoded(sys.stdin.buffer.read(DOCUMENT_BYTES_MAX + 1), "stdin")
    if source.startswith("@@"):
        return source[1:]
    return _read(Path(source[1:])) if source.startswith("@") else source


def expand(prompt: str, documents: Sequence[str]) -> str:
    """``prompt`` with its placeholders replaced.

    Args:
        documents: `NAME=PATH` each.

    Raises:
        UsageFault: a placeholder without a document, a document without a placeholder, or a file that cannot be read.
    """
    paths = _paths(documents)
    names = dict.fromkeys(_PLACEHOLDER.findall(prompt))
    for name in paths:
        if name not in names:
            raise UsageFault(f"--documents {name}=...: the prompt has no placeholder {{{name}}}")
    for name in names:
        if name not in paths and name != BUNDLED:
            raise UsageFault(f"the prompt's placeholder {{{name}}} has no document: add --documents {name}=PATH")
    texts = {name: _read(paths.get(name) or Path(__file__).parent / "documents" / "lmcache.txt") for name in names}
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], prompt)


def _paths(documents: Sequence[str]) -> Mapping[str, Path]:
    paths: dict[str, Path] = {}
    for item in documents:
        name, equals, path = item.partition("=")
        if not equals or not path or not re.fullmatch(r"\w+", name):
            raise UsageFault(f"--documents {item}: expected NAME=PATH, where NAME is letters, digits and underscores")
        if name in paths:
            raise UsageFault(f"--documents {name}=... is given twice")
        paths[name] = Path(path)
    return paths


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(DOCUMENT_BYTES_MAX + 1)
    except (OSError, ValueError) as error:
        raise UsageFault(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    return _decoded(content, str(path))


def _decoded(content: bytes, name: str) -> str:
    if len(content) > DOCUMENT_BYTES_MAX:
        raise UsageFault(f"{name} is longer than {DOCUMENT_BYTES_MAX >> 20} MiB")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageFault(f"{name} is not UTF-8 text") from error
