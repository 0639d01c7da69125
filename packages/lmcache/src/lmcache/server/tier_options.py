"""From the options of the command line to those of adapters."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence

from lmcache.errors import ConfigError

ADAPTER_BYTES_MAX = 64 << 10


def read_tiers(path: str | None, size_gb: float | None, adapters: Sequence[str]) -> tuple[Mapping[str, object], ...]:
    """Options of each tier, uppermost first: the folder of ``--l2-path``, then ``--l2-adapter`` in their order.

    Raises:
        ConfigError: one sentence.
    """
    tiers: list[Mapping[str, object]] = []
    if (path is None) != (size_gb is None):
        raise ConfigError("--l2-path and --l2-size-gb go together")
    if path is not None and size_gb is not None:
        tiers.append({"type": "file", "base_path": os.path.abspath(path), "capacity_gb": size_gb})
    tiers += [_read(text) for text in adapters]
    return tuple(tiers)


def _read(text: str) -> Mapping[str, object]:
    if text.startswith("@"):
        try:
            with open(text[1:], encoding="utf-8") as file:
                text = file.read(ADAPTER_BYTES_MAX)
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise ConfigError(f"--l2-adapter {text}: {reason}") from None
    try:
        options = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--l2-adapter is not valid JSON: {error}") from None
    if not isinstance(options, dict) or not isinstance(options.get("type"), str):
        raise ConfigError('--l2-adapter is a JSON object with a "type", such as {"type": "file", ...}')
    return options
