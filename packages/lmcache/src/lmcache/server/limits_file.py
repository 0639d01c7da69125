"""Limits of tenants on disk: what an operator has set once holds for every later server of the same instance.

``$XDG_STATE_HOME/lmcache/<instance>/quotas.json`` (``~/.local/state`` where the variable is not set), for this user
alone, because salts may be secret. A server that cannot understand the file does not start: without its limits one
tenant could push out the others.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping

from lmcache.errors import ConfigError
from lmcache.server.tenants import LIMITS_MAX, SALT_BYTES_MAX

NAME = "quotas.json"
FILE_BYTES_MAX = 1 << 20
_VERSION = 1


def state_folder(instance: str) -> str:
    """Where the server of that instance keeps what outlives the machine's start; need not exist yet."""
    root = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(root):  # so says the specification of the variable
        root = os.path.expanduser("~/.local/state")
    return os.path.join(root, "lmcache", instance)


class LimitsFile:
    """The file of one instance. One server at a time: the lock on the instance's pool sees to that."""

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, NAME)
        self._folder = folder

    def load(self) -> dict[str, float]:
        """Limits in GB by salt; none where there is no file.

        Raises:
            ConfigError: the file cannot be read, others may write it, or it holds something else.
        """
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise ConfigError(f"cannot read the limits of tenants in {self.path}: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
                raise ConfigError(f"{self.path} is not a file that this user alone can write: mend or remove it")
            with open(descriptor, "rb", closefd=False) as file:
                data = file.read(FILE_BYTES_MAX + 1)
        finally:
            os.close(descriptor)
        try:
            return _limits(data)
        except (ValueError, OverflowError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else "it is not JSON"
            raise ConfigError(f"{self.path} does not hold limits of tenants: {reason}; mend or remove it") from error

    def save(self, limits_gb: Mapping[str, float]) -> None:
        """Replace the file; when this returns, the limits survive a loss of power.

        Raises:
            ConfigError: that is not possible; what was there before is still there.
        """
        data = json.dumps({"version": _VERSION, "limits_gb": dict(limits_gb)}, indent=1).encode() + b"\n"
        beside = f"{self.path}.new"
        flags = os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_CREAT | os.O_EXCL
        try:
            os.makedirs(os.path.dirname(self._folder), mode=0o700, exist_ok=True)
            os.makedirs(self._folder, mode=0o700, exist_ok=True)
            if os.path.lexists(beside):  # of a server that was killed in here
                os.unlink(beside)
            with open(os.open(beside, flags, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path)
            folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise ConfigError(f"cannot keep the limits of tenants in {self.path}: {error.strerror}") from error


def _limits(data: bytes) -> dict[str, float]:
    """The content of a file.

    Raises:
        ValueError: it is not ours; JSON's own errors are subclasses.
    """
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"it has more than {FILE_BYTES_MAX} bytes")
    document = json.loads(data)
    if not isinstance(document, dict) or not isinstance(document.get("limits_gb"), dict):
        raise ValueError('it has no "limits_gb"')
    if document.get("version") != _VERSION:
        raise ValueError(f"it has version {str(document.get('version'))[:20]}, this server knows {_VERSION}")
    limits = document["limits_gb"]
    if len(limits) > LIMITS_MAX:
        raise ValueError(f"it has more than {LIMITS_MAX} limits")
    for salt, limit in limits.items():
        is_number = isinstance(limit, (int, float)) and not isinstance(limit, bool)
        if not is_number or not 0 <= limit < math.inf:
            raise ValueError("a limit is not a number of GB, 0 or more")
        if len(salt.encode()) > SALT_BYTES_MAX:
            raise ValueError(f"a salt has more than {SALT_BYTES_MAX} bytes")
    return {salt: float(limit) for salt, limit in limits.items()}
