"""One HTTP call over httpx: its deadline, its limits, and what becomes of each of its failures."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx

from lmcache_cli import failures, urls
from lmcache_cli._deadline import within
from lmcache_cli.errors import BadAnswer
from lmcache_cli.target import Target

BODY_BYTES_MAX = 16 << 20

T = TypeVar("T", bound="Service")


class Service:
    """Base of both services: owns the connection.

    Args:
        target: where, and with what.
        http: the client to use; by default one for ``target``.
    """

    def __init__(self, target: Target, http: httpx.Client | None = None) -> None:
        self._target = target
        self._url = target.url
        self._http = http or connect(target)

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def _answer(self, method: str, path: str, body: Any = None) -> bytes:
        """The body of a 200; anything else raises."""
        return answer(self._http, method, f"{self._url}{path}", body, self._target.timeout_s)

    def _document(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """The JSON object that a 200 carries; anything else raises."""
        content = self._answer(method, path, body)
        try:
            document = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"what {self._url}{path} answers is not JSON") from error
        if not isinstance(document, dict):
            raise BadAnswer(f"what {self._url}{path} answers is not a JSON object")
        return document


def probe(target: Target, path: str) -> None:
    """GET ``path`` and raise unless it answers 200; for addresses that only a proxy reaches."""
    with connect(target) as http:
        answer(http, "GET", f"{target.url}{path}", None, target.timeout_s)


def connect(target: Target) -> httpx.Client:
    """A client for ``target``; connects when it is first used."""
    proxy = urls.proxy_for(target.url)
    if target.url.startswith("https:") or (proxy or "").startswith("https:"):
        context = target.ssl_context()
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody; loading authorities takes 20 ms
    headers = target.all_headers()
    return httpx.Client(trust_env=False, proxy=proxy, verify=context, follow_redirects=False, headers=headers)


def answer(http: httpx.Client, method: str, url: str, body: Any, deadline_s: float) -> bytes:
    """The body of a 200; anything else raises."""

    def call() -> tuple[int, bytes]:
        with (
            translated(url, deadline_s),
            http.stream(method, url, json=body, timeout=httpx.Timeout(deadline_s)) as response,
        ):
            return response.status_code, bounded(response, url)

    status, content = within(deadline_s, call, str(failures.timed_out(url, deadline_s)))
    if status != 200:
        raise failures.http_failure(url, status, content)
    return content


class translated:
    """Turns what httpx raises into errors of ours."""

    def __init__(self, url: str, seconds: float) -> None:
        self._url = url
        self._seconds = seconds

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, httpx.TimeoutException):
            raise failures.timed_out(self._url, self._seconds) from error
        if isinstance(error, httpx.ConnectError | httpx.ProxyError):
            raise failures.unreachable(self._url, error) from error
        if isinstance(error, httpx.RemoteProtocolError) and not re.search("disconnect|closed", str(error)):
            raise failures.not_http(self._url) from error
        if isinstance(error, httpx.HTTPError):
            raise failures.broken_off(self._url) from error


def bounded(response: httpx.Response, url: str) -> bytes:
    """The whole body.

    Raises:
        BadAnswer: it is longer than ``BODY_BYTES_MAX``.
    """
    content = bytearray()
    for piece in response.iter_bytes():
        content += piece
        if len(content) > BODY_BYTES_MAX:
            raise BadAnswer(f"the answer of {url} is longer than {BODY_BYTES_MAX >> 20} MiB")
    return bytes(content)


def count(block: object, key: str) -> int | None:
    """The number under ``key`` of a JSON object that an engine sent; None when there is no such number."""
    value = block.get(key) if isinstance(block, Mapping) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
