"""The configuration file: one flat JSON object, whose keys are the flags'. Those that upstream exports replay here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lmcache_cli import output
from lmcache_cli.bench import config
from lmcache_cli.errors import UsageFault

FILE_BYTES_MAX = 1 << 20
VERSION = 1

UNUSED = ("rag_dataset", "output_dir", "no_csv", "json", "quiet")
"""Keys of upstream's files that decide nothing here."""

NOT_EXPORTED = ("engine_url", "lmcache_url")


def read(path: str) -> tuple[dict[str, Any], list[str]]:
    """What a file sets, by key, checked; and which of its keys decide nothing here.

    Raises:
        UsageFault: it cannot be read, a key is unknown, or a value is not one that the key can have.
    """
    values: dict[str, Any] = {}
    unused: list[str] = []
    for key, value in _document(path).items():
        option = config.OPTIONS.get(key)
        if key in UNUSED:
            unused.append(key)
        elif key == "version":
            if value != VERSION:
                raise UsageFault(f"--config {path}: version {VERSION} is understood, and it has {value!r}")
        elif option is None:
            raise UsageFault(f"--config {path}: there is no setting '{key}'{_near(key)}")
        elif value is not None:  # null: not set
            try:
                values[key] = config.check(option, value)
            except (ValueError, UsageFault) as error:
                raise UsageFault(f"--config {path}: '{key}': {error}") from error
    if "concurrency" in values and "request_rate" in values:
        raise UsageFault(f"--config {path}: 'concurrency' and 'request_rate' exclude each other")
    return values, unused


class Export:
    """The file of `--export-config`; tried out when this is made, so that an unwritable path costs no request.

    Raises:
        UsageFault: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = output.OutputFile(path, "--export-config")

    def write(self, settled: config.Config) -> None:
        """Write it, as a whole or not at all; addresses are left out, since they belong to a place and not to a test.

        Raises:
            CommandError: it could not be written after all.
        """
        values = {key: value for key, value in settled.as_file().items() if key not in NOT_EXPORTED}
        self._file.write(json.dumps(values, indent=2, ensure_ascii=True) + "\n")


def _document(path: str) -> Mapping[str, Any]:
    try:
        with open(path, "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
        if len(data) > FILE_BYTES_MAX:
            raise ValueError(f"it is larger than {FILE_BYTES_MAX >> 20} MiB")
        document = json.loads(data, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise UsageFault(f"cannot read --config {path}: it is not text in UTF-8") from error
    except json.JSONDecodeError as error:
        raise UsageFault(f"cannot read --config {path}: it is not JSON (line {error.lineno}: {error.msg})") from error
    except RecursionError as error:
        raise UsageFault(f"cannot read --config {path}: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise UsageFault(f"cannot read --config {path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(document, dict):
        raise UsageFault(f"--config {path}: expected a JSON object of settings")
    return document


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _near(key: str) -> str:
    import difflib

    near = difflib.get_close_matches(key, config.OPTIONS, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""
