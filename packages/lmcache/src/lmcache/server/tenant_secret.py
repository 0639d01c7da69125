"""The key under which this server's tenants are written down: made once, and kept.

``$XDG_STATE_HOME/lmcache/<instance>/tenant.key``, for this user alone. Servers that share a tier, and are to count its
tenants together, need copies of one file.
"""

from __future__ import annotations

import logging
import os

from lmcache.errors import ConfigError
from lmcache.keys import TENANT_SECRET_BYTES
from lmcache.system import Entropy, read_private

NAME = "tenant.key"

log = logging.getLogger("lmcache.core")


def tenant_secret(folder: str, entropy: Entropy) -> bytes:
    """The secret kept in ``folder``, made there if there is none yet. Where it cannot be kept it lasts as long as this
    server, and the log says so.

    Raises:
        ConfigError: others can read the file, or it is something else.
    """
    path = os.path.join(folder, NAME)
    try:
        secret = read_private(path, path, TENANT_SECRET_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return _make(folder, path, entropy.token(TENANT_SECRET_BYTES))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(secret) != TENANT_SECRET_BYTES:
        raise ConfigError(f"{path} does not hold {TENANT_SECRET_BYTES} bytes: mend or remove it")
    return secret


def _make(folder: str, path: str, secret: bytes) -> bytes:
    temporary = f"{path}.new"
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(secret)
        os.replace(temporary, path)
    except OSError as error:
        log.warning("cannot keep %s (%s): the next server will know its tenants by others", path, error.strerror)
    return secret
