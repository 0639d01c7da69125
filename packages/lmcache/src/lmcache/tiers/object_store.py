"""Where an object store is and how to come in; and its library's failures as one sentence each."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lmcache.errors import TierError
from lmcache.tiers.base import CALL_S
from lmcache.tiers.options import Options

BACKENDS = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "file": "local",
    "memory": "memory",
}
TRIES = 3
RETRY_PART = 0.25  # of timeout_s, in which a failed request may be tried again; one try gets the rest

_STATUS = re.compile(r"status code: (\d{3})\b")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>")
_FULL_CODES = ("QuotaExceeded", "XMinioStorageFull", "InsufficientStorage", "StorageFull")
_FULL_STATUS = 507
_DISK_FULL = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT))


@dataclass(frozen=True, slots=True)
class Site:
    """A store as the options name it. ``config``: what obstore calls the credentials and settings of this backend."""

    backend: str
    bucket: str
    prefix: str
    timeout_s: float
    connect_timeout_s: float
    allow_http: bool
    cacert: str | None
    config: dict[str, Any] = field(repr=False)

    @property
    def place(self) -> str | None:
        """For people; None in memory."""
        if self.backend == "memory":
            return None
        scheme = next(scheme for scheme, backend in BACKENDS.items() if backend == self.backend)
        endpoint = self.config.get("endpoint") or self.config.get("base_url")
        path = f"{self.bucket}/{self.prefix}" if self.bucket and self.prefix else self.bucket or f"/{self.prefix}"
        return f"{scheme}://{path}" + (f" at {endpoint}" if endpoint else "")


def site(options: Options) -> Site:
    """Read all options that say where and how."""
    url = urlsplit(options.text("url"))
    backend = BACKENDS.get(url.scheme)
    if backend is None:
        raise options.error(f"'url' begins with one of {', '.join(f'{scheme}://' for scheme in BACKENDS)}")
    if url.query or url.fragment or "@" in url.netloc:
        raise options.error("'url' is a scheme, a bucket and a prefix, and nothing else")
    prefix = unquote(url.path).strip("/")
    if backend == "local" and (url.netloc or not prefix):
        raise options.error("'url' of a folder is file:// and an absolute path")
    if backend in ("s3", "gcs", "azure") and not url.netloc:
        raise options.error("'url' names no bucket")
    config = _config(options, backend)
    allow_http = options.flag("allow_http", False)
    endpoint = urlsplit(str(config.get("endpoint") or config.get("base_url") or "https://"))
    if endpoint.scheme not in ("http", "https") or "@" in endpoint.netloc or endpoint.query:
        raise options.error("'endpoint' is an address that begins with https:// or http://, without credentials")
    if endpoint.scheme == "http" and not allow_http:
        raise options.error("'endpoint' is not encrypted: set 'allow_http' to true if that is meant")
    timeout_s = options.number("timeout_s", CALL_S, 0.1, 3600.0)
    return Site(
        backend=backend,
        bucket=url.netloc,
        prefix=prefix,
        timeout_s=timeout_s,
        connect_timeout_s=options.number("connect_timeout_s", min(5.0, timeout_s), 0.1, 3600.0),
        allow_http=allow_http,
        cacert=options.text("cacert", "") or None,
        config=config,
    )


def _config(options: Options, backend: str) -> dict[str, Any]:
    """What is not given is left to obstore: the environment, the instance's role."""
    given: dict[str, Any] = {}
    if backend == "s3":
        given["endpoint"] = options.text("endpoint", "")
        given["region"] = options.text("region", "")
        given["access_key_id"] = options.text("access_key_id", "") or options.secret("access_key_id")
        given["secret_access_key"] = options.secret("secret_access_key")
        given["session_token"] = options.secret("token")
        given["virtual_hosted_style_request"] = options.flag("virtual_hosted", False)
        # a digest of the whole body before its first byte leaves costs too much; objects have their own checksums
        given["unsigned_payload"] = True
    elif backend == "gcs":
        given["base_url"] = options.text("endpoint", "")
        given["service_account"] = options.text("service_account_file", "")
        given["bearer_token"] = options.secret("token")
    elif backend == "azure":
        given["endpoint"] = options.text("endpoint", "")
        given["account_name"] = options.text("account_name", "")
        given["account_key"] = options.secret("account_key")
        given["sas_key"] = options.secret("sas_token")
    return {name: value for name, value in given.items() if value}


def build(where: Site) -> Any:
    """The obstore store; no request is made yet.

    Raises:
        TierError: the settings contradict each other, or a folder cannot be made.
    """
    from obstore import store

    try:
        if where.backend == "memory":
            return store.MemoryStore()
        if where.backend == "local":
            return store.LocalStore(f"/{where.prefix}", mkdir=True)
        client: dict[str, Any] = {
            "timeout": timedelta(seconds=where.timeout_s * (1 - RETRY_PART)),
            "connect_timeout": timedelta(seconds=min(where.connect_timeout_s, where.timeout_s * (1 - RETRY_PART))),
            "allow_http": where.allow_http,
        }
        if where.cacert is not None:
            client["root_certificate"] = Path(where.cacert).read_bytes()
        retry: dict[str, Any] = {
            "max_retries": TRIES - 1,
            "retry_timeout": timedelta(seconds=where.timeout_s * RETRY_PART),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
        }
        kind: Any = {"s3": store.S3Store, "gcs": store.GCSStore, "azure": store.AzureStore}[where.backend]
        return kind(
            where.bucket,
            prefix=where.prefix or None,
            config=where.config,
            client_options=client,
            retry_config=retry,
        )
    except Exception as error:
        # of many kinds; the text of a setting that is refused may hold its value
        if isinstance(error, OSError) and error.strerror:
            raise TierError(f"{where.place} cannot be used: {error.filename}: {error.strerror}") from None
        raise TierError(
            f"{where.place} cannot be used: obstore refuses its settings ({type(error).__name__})"
        ) from None


def is_full(error: Exception) -> bool:
    """Whether a put failed only because the store has no room."""
    text = str(error)
    code, status = _CODE.search(text), _STATUS.search(text)
    if any(reason in text for reason in _DISK_FULL) or (code and code[1] in _FULL_CODES):
        return True
    return bool(status and int(status[1]) == _FULL_STATUS)


def is_absent(error: Exception) -> bool:
    """Whether there simply is no such object."""
    return isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error)


def failure(where: Site, error: Exception) -> TierError:
    """One sentence, without what the library adds: addresses with signatures in them, and pages of its own state."""
    text = str(error)
    status, code = _STATUS.search(text), _CODE.search(text)
    words = " ".join(part for part in (status[1] if status else "", code[1] if code else "") if part)
    name = type(error).__name__
    if code and code[1] == "NoSuchBucket":
        return TierError(f"{where.place}: there is no such bucket")
    if name in ("PermissionDeniedError", "UnauthenticatedError") or (status and status[1] in ("401", "403")):
        return TierError(f"{where.place} refused these credentials" + (f" ({words})" if words else ""))
    if status:
        return TierError(f"{where.place} answered {words}")
    if "error sending request" in text or "timed out" in text or "HTTP error" in text:
        return TierError(f"{where.place} cannot be reached, or did not answer in time")
    return TierError(f"{where.place} failed: {name}")
