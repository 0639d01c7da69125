"""The TLS of the HTTP API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lmcache.errors import ConfigError
from lmcache.server.access import open_private

if TYPE_CHECKING:
    import ssl


def context(certificate: str | None, key: str | None) -> ssl.SSLContext | None:
    """TLS 1.2 or later with a certificate and its private key; None where there are none.

    Raises:
        ConfigError: a file cannot be read, is no PEM, needs a passphrase; the key can be read by others, or belongs to
        another certificate.
    """
    if certificate is None or key is None:
        return None
    import ssl

    open_private(key, "--tls-key")
    made = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        made.load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"--tls-key {key} is not the key of --tls-cert {certificate}") from None
        raise ConfigError(f"cannot use --tls-cert {certificate} with --tls-key {key}: they must be PEM files") from None
    except OSError as error:
        raise ConfigError(f"--tls-cert: cannot read {certificate}: {error.strerror}") from None
    return made


def _no_passphrase() -> str:
    """Called for an encrypted key only, instead of asking on the terminal."""
    raise ConfigError("--tls-key is encrypted with a passphrase: give the key without one, readable by its owner only")
