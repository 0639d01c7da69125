"""Sentences for what goes wrong between us and a server, the same whichever HTTP library met it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from http import HTTPStatus
from urllib.parse import urlsplit

from lmcache_cli import api
from lmcache_cli.errors import BadAnswer, HttpFailure, TimedOut, Unreachable

_DETAIL_CHARS_MAX = 300


def unreachable(url: str, error: BaseException) -> Unreachable:
    """No connection to ``url``; the reason is looked for in the chain of causes of ``error``."""
    return Unreachable(f"cannot connect to {_origin(url)}: {_reason(error)}")


def timed_out(url: str, seconds: float) -> TimedOut:
    """``url`` was silent for ``seconds``."""
    return TimedOut(f"{url} did not answer within {seconds:g} s{_port_hint(url)}")


def broken_off(url: str) -> Unreachable:
    """The connection ended before an answer was complete."""
    return Unreachable(f"{url} closed the connection without a complete answer")


def not_http(url: str) -> BadAnswer:
    """Whatever listens at ``url`` does not speak HTTP."""
    return BadAnswer(f"{_origin(url)} does not answer in HTTP{_port_hint(url)}")


def http_failure(url: str, status: int, body: bytes) -> HttpFailure:
    """An answer other than 200, with the server's own words when it gives some."""
    try:
        phrase = f" {HTTPStatus(status).phrase}"
    except ValueError:
        phrase = ""
    detail = server_words(body)
    return HttpFailure(status, f"HTTP {status}{phrase} from {url}" + (f": {detail}" if detail else ""))


def server_words(body: bytes) -> str:
    """What an error body says: `error`, `detail`, `message` or `reason` of a JSON object, nested or not; else ""."""
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        return ""
    for _ in range(3):  # {"error": {"message": {...}}} is as deep as servers go
        if isinstance(document, list) and document:
            document = document[0]
        if not isinstance(document, Mapping):
            break
        document = next((document[k] for k in ("error", "detail", "message", "reason", "msg") if document.get(k)), "")
    return document[:_DETAIL_CHARS_MAX] if isinstance(document, str) else ""


def _port_hint(url: str) -> str:
    if urlsplit(url).port != api.RPC_PORT:
        return ""
    return f" ({api.RPC_PORT} is the RPC port; HTTP is on {api.HTTP_PORT} unless set otherwise)"


def _origin(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            break
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__
