"""Which spellings of a server's address are accepted, and which addresses are reached through a proxy."""

from __future__ import annotations

import ipaddress
import os
from urllib.parse import urlsplit

LABEL_BYTES_MAX = 63

_PROXY_VARIABLES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def base_url(text: str) -> str:
    """Normal form of an address: scheme, host, port, path, without a trailing `/` or `/v1`.

    Accepted are `localhost:8080`, `http://host[:port]` and `https://host[:port]`, with or without a trailing `/` or
    `/v1` (a gateway's path in between is kept).

    Raises:
        ValueError: anything else; the text is one sentence.
    """
    wrong = f"{text!r} is not an address such as localhost:8080 or http://host:8080"
    url = text if "://" in text else f"http://{text}"
    # urlsplit drops tabs and line ends silently, and lets spaces and backslashes through
    if not text or not url.isascii() or not url.isprintable() or any(c in url for c in ' \\<>"'):
        raise ValueError(wrong)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(wrong) from error
    if parts.scheme.lower() not in ("http", "https") or not host or port == 0:
        raise ValueError(wrong)
    # resolvers encode names with IDNA, which knows no empty label and none above 63 bytes
    if any(not 0 < len(label) <= LABEL_BYTES_MAX for label in host.removesuffix(".").split(".")):
        raise ValueError(wrong)
    if parts.query or parts.fragment or "@" in parts.netloc or parts.netloc.endswith(":"):
        raise ValueError(f"{wrong}: user names, queries and fragments have no place in it")
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme.lower()}://{parts.netloc.lower()}{path}"


def is_loopback(url: str) -> bool:
    """Whether ``url`` (in normal form) names this machine."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def proxy_for(url: str) -> str | None:
    """The proxy the environment names (`http_proxy`, `https_proxy`, `all_proxy`, `no_proxy`); loopback never."""
    if is_loopback(url) or not any(os.environ.get(name) for name in _PROXY_VARIABLES):
        return None
    from urllib.request import getproxies_environment, proxy_bypass_environment  # type: ignore[attr-defined]

    proxies = getproxies_environment()
    parts = urlsplit(url)
    if proxy_bypass_environment(parts.netloc, proxies):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")
