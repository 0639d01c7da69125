"""HTTP: one class a service, one method an endpoint; each is a context manager. The only door to httpx.

Methods return what ``api`` describes, or raise what ``errors`` draws. No proxy for loopback, nothing from netrc, no
redirects, no retries; every call has a deadline and every answer a size limit.
"""

from __future__ import annotations

import json
import os
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from lmcache_cli import api, failures, legacy, urls
from lmcache_cli._deadline import within
from lmcache_cli._version import __version__
from lmcache_cli.errors import BadAnswer, CutShort, HttpFailure, ServerError, TimedOut, Unreachable, WrongService

DEADLINE_S = 10.0
BODY_BYTES_MAX = 16 << 20
STREAM_BYTES_MAX = 256 << 20
LINE_BYTES_MAX = 4 << 20

T = TypeVar("T", bound="_Service")


class _Service:
    def __init__(self, url: str, http: httpx.Client | None) -> None:
        self._url = url
        self._http = http or _client(url)

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()


class CacheServer(_Service):
    """An LMCache server's HTTP API.

    Args:
        url: in the normal form of ``urls.base_url``.
        http: the client to use; by default one for ``url``.
    """

    def __init__(self, url: str, http: httpx.Client | None = None) -> None:
        super().__init__(url, http)

    def status(self) -> api.Status:
        """GET /status, of this or an earlier generation of servers."""
        document = self._call("GET", api.PATH_STATUS)
        if not document.keys() & {"is_healthy", "engine_type", "storage_manager"}:
            raise BadAnswer(f"what {self._url}{api.PATH_STATUS} answers is no LMCache status")
        return api.from_json(api.Status, legacy.modern_status(document))

    def clear(self, request: api.ClearRequest) -> api.Cleared:
        """POST /cache/clear."""
        reply = api.from_json(api.ClearReply, self._call("POST", api.PATH_CLEAR, api.to_json(request)))
        if reply.status != "ok":
            raise BadAnswer(f"{self._url}{api.PATH_CLEAR} did not confirm that the cache was cleared")
        return reply.cleared or api.Cleared()

    def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        try:
            return _json_object(self._url, path, _answer(self._http, method, f"{self._url}{path}", body))
        except HttpFailure as failure:
            if failure.status == 404 and self._is_engine():
                raise WrongService(self._engine_hint()) from failure
            raise

    def _is_engine(self) -> bool:
        """Whether a serving engine answers here: it lists models, or asks for a key to do so, or has /health."""
        try:
            _answer(self._http, "GET", f"{self._url}{api.ENGINE_PATH_MODELS}")
        except HttpFailure as failure:
            if failure.status in (401, 403):
                return True
        except ServerError:
            return False
        else:
            return True
        try:
            _answer(self._http, "GET", f"{self._url}{api.ENGINE_PATH_HEALTH}")
        except ServerError:
            return False
        return True

    def _engine_hint(self) -> str:
        host = urlsplit(self._url).hostname or ""
        usual = f"http://{f'[{host}]' if ':' in host else host}:{api.HTTP_PORT}"
        return (
            f"{self._url} is a serving engine (vLLM or alike), not an LMCache server, whose port is {api.HTTP_PORT} "
            f"unless set otherwise" + (f": try --url {usual}" if usual != self._url else "")
        )


class Engine(_Service):
    """A serving engine's API, as OpenAI defines it.

    The key in OPENAI_API_KEY is sent as bearer token when set; what authenticates us to a cache server never is.

    Args:
        url: in the normal form of ``urls.base_url``.
        silence_s: longest wait for the engine's next bytes.
        http: the client to use; by default one for ``url``.
    """

    def __init__(self, url: str, silence_s: float, http: httpx.Client | None = None) -> None:
        super().__init__(url, http)
        self._silence_s = silence_s
        key = os.environ.get("OPENAI_API_KEY")
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def models(self) -> list[str]:
        """GET /v1/models: the names it serves, in its order."""
        path = api.ENGINE_PATH_MODELS
        body = _answer(self._http, "GET", f"{self._url}{path}", None, self._headers, self._silence_s)
        entries = _json_object(self._url, path, body).get("data")
        names = [item.get("id") for item in entries if isinstance(item, dict)] if isinstance(entries, list) else []
        return [name for name in names if isinstance(name, str)]

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """POST ``body`` and yield the events of the answer as they arrive, until the `[DONE]` that must end it.

        Raises:
            CutShort: the stream ended without `[DONE]`.
            TimedOut: no event for ``silence_s``.
            BadAnswer: the answer is no stream of JSON events, or the engine reported an error in it.
        """
        url = f"{self._url}{path}"
        seen = False
        try:
            for event in self._events(url, body):
                yield event
                seen = True
        except Unreachable as error:
            if not seen or isinstance(error, TimedOut):
                raise
            raise CutShort(f"{url} broke the stream off before its end, so nothing was measured") from error

    def _events(self, url: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        timeout = httpx.Timeout(self._silence_s)
        seen = False
        with (
            _translated(url, self._silence_s),
            self._http.stream("POST", url, json=body, headers=self._headers, timeout=timeout) as response,
        ):
            if response.status_code != 200:
                raise failures.http_failure(url, response.status_code, _bounded(response, url))
            for data in _event_data(response, url, self._silence_s):
                if data == b"[DONE]":
                    return
                yield _event(data, url)
                seen = True
        if not seen:
            raise BadAnswer(f"{url} did not answer with a stream of events")
        raise CutShort(f"{url} ended the stream before its end, so nothing was measured")


def probe(url: str) -> None:
    """GET ``url`` and raise unless it answers 200; for addresses that only a proxy reaches."""
    with _client(url) as http:
        _answer(http, "GET", url)


def _client(url: str) -> httpx.Client:
    proxy = urls.proxy_for(url)
    if url.startswith("https:") or (proxy or "").startswith("https:"):
        context = ssl.create_default_context()  # the system's authorities, as curl and the browser use them
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody; loading authorities takes 20 ms
    agent = {"User-Agent": f"lmcache-cli/{__version__}"}
    return httpx.Client(trust_env=False, proxy=proxy, verify=context, follow_redirects=False, headers=agent)


def _answer(
    http: httpx.Client,
    method: str,
    url: str,
    body: Any = None,
    headers: Mapping[str, str] | None = None,
    deadline_s: float = DEADLINE_S,
) -> bytes:
    """The body of a 200; anything else raises."""

    def call() -> tuple[int, bytes]:
        with (
            _translated(url, deadline_s),
            http.stream(method, url, json=body, headers=headers, timeout=httpx.Timeout(deadline_s)) as response,
        ):
            return response.status_code, _bounded(response, url)

    status, content = within(deadline_s, call, str(failures.timed_out(url, deadline_s)))
    if status != 200:
        raise failures.http_failure(url, status, content)
    return content


class _translated:
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


def _bounded(response: httpx.Response, url: str) -> bytes:
    content = bytearray()
    for piece in response.iter_bytes():
        content += piece
        if len(content) > BODY_BYTES_MAX:
            raise BadAnswer(f"the answer of {url} is longer than {BODY_BYTES_MAX >> 20} MiB")
    return bytes(content)


def _json_object(url: str, path: str, content: bytes) -> dict[str, Any]:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"what {url}{path} answers is not JSON") from error
    if not isinstance(document, dict):
        raise BadAnswer(f"what {url}{path} answers is not a JSON object")
    return document


def _event_data(response: httpx.Response, url: str, silence_s: float) -> Iterator[bytes]:
    """The payload of every `data:` line of a text/event-stream."""
    # not httpx's iter_lines: it also splits at U+2028 and the like, which JSON may hold unescaped
    rest = b""
    total = 0
    last_event = time.monotonic()
    for piece in response.iter_bytes():
        total += len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                last_event = time.monotonic()
                yield line[5:].strip()
        if time.monotonic() - last_event > silence_s:  # comments that keep the connection alive are no progress
            raise failures.timed_out(url, silence_s)
        if total > STREAM_BYTES_MAX or len(rest) > LINE_BYTES_MAX:
            raise BadAnswer(f"the stream of {url} is longer than any answer to this request can be")
    if rest.startswith(b"data:"):
        yield rest[5:].strip()


def _event(data: bytes, url: str) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"{url} sent an event that is not JSON") from error
    if not isinstance(event, dict):
        raise BadAnswer(f"{url} sent an event that is not a JSON object")
    if event.get("error"):
        raise BadAnswer(f"{url} reported an error: {failures.server_words(data) or 'without saying which'}")
    return event
