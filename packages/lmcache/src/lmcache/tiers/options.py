"""Options of one adapter, read from the JSON object of `--l2-adapter`: every one is checked, and none is left over."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping
from typing import TypeVar, cast

from lmcache.errors import ConfigError

GB = 1 << 30
SECRETS = ("password", "secret", "token", "secret_access_key", "account_key", "sas_token")
"""Options that may not stand in the JSON itself; ``NAME_env`` names an environment variable, ``NAME_file`` a file."""

T = TypeVar("T", str, bool, int, dict[str, object])


class Options:
    """The options of one adapter. Read what you know, then call ``finish``."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.type = str(values.get("type", ""))
        self._values = {name: value for name, value in values.items() if name != "type"}
        for name in SECRETS:
            if name in self._values:
                raise self.error(f"{name!r} would be seen in the process list: give {name}_env or {name}_file instead")

    def error(self, sentence: str) -> ConfigError:
        """An error that names this adapter."""
        return ConfigError(f"--l2-adapter {self.type!r}: {sentence}")

    def text(self, name: str, default: str | None = None) -> str:
        """A string. Raises ConfigError where it is missing and has no default."""
        return self._get(name, str, "a string", default)

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        return self._get(name, bool, "true or false", default)

    def integer(self, name: str, default: int, low: int, high: int) -> int:
        """A whole number within bounds."""
        value = self._get(name, int, "a whole number", default)
        if isinstance(value, bool) or not low <= value <= high:
            raise self.error(f"{name!r} is {low} to {high}")
        return value

    def number(self, name: str, default: float | None, low: float, high: float) -> float:
        """A number within bounds. Raises ConfigError where it is missing and has no default."""
        value = self._values.pop(name, default)
        if value is None:
            raise self.error(f"{name!r} is missing")
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or not low <= cast(float, value) <= high:
            raise self.error(f"{name!r} is a number from {low:g} to {high:g}")
        return float(cast(float, value))

    def table(self, name: str) -> dict[str, object]:
        """A JSON object; empty where it is missing."""
        return self._get(name, dict, "an object", {})

    def secret(self, name: str) -> str | None:
        """What the variable ``NAME_env`` or the first line of the file ``NAME_file`` holds; None where neither is
        named."""
        variable, path = self._values.pop(f"{name}_env", None), self._values.pop(f"{name}_file", None)
        if variable is not None:
            value = os.environ.get(str(variable))
            if value is None:
                raise self.error(f"the environment variable {variable!r} is not set")
            return value
        if path is None:
            return None
        try:
            with open(str(path), encoding="utf-8") as file:
                return file.readline().rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not text"
            raise self.error(f"{name}_file {str(path)!r} cannot be read: {reason}") from None

    def require(self, module: str, extra: str) -> None:
        """See that a library is installed, without importing it."""
        if importlib.util.find_spec(module) is None:
            raise self.error(f"needs the package {module!r}: pip install 'lmcache[{extra}]'")

    def finish(self) -> None:
        """Raises ConfigError if an option was given that nobody read."""
        if self._values:
            raise self.error(f"unknown option {sorted(self._values)[0]!r}")

    def _get(self, name: str, kind: type[T], what: str, default: T | None) -> T:
        value = self._values.pop(name, default)
        if value is None:
            raise self.error(f"{name!r} is missing")
        if not isinstance(value, kind):
            raise self.error(f"{name!r} is {what}")
        return value
