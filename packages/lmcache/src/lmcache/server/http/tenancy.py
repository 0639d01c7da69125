"""/quota: limits of tenants. They are recorded and shown; nothing enforces them yet."""

from __future__ import annotations

import json
import math
from typing import Any
from urllib.parse import unquote_to_bytes

from fastapi import FastAPI, Request, Response
from starlette.convertors import Convertor, register_url_convertor

from lmcache.server.http.replies import Rejected, ask, read_body, read_object, reply
from lmcache.server.link import CoreLink
from lmcache.server.tenants import SALT_BYTES_MAX
from lmcache.wire.messages import Limit, Limited, Report, Tenants
from lmcache_cli import api

_LIMIT_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["limit_gb"],
                "properties": {"limit_gb": {"type": "number", "minimum": 0}},
            }
        }
    },
}
_PATH = f"{api.PATH_QUOTA}/{{salt:any}}"


class _Any(Convertor[str]):
    """What `path` takes, and line ends."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("any", _Any())


def add_routes(app: FastAPI, link: CoreLink) -> None:
    """Add the four verbs."""

    @app.get(api.PATH_QUOTA, response_model=api.QuotaList)
    async def list_limits() -> Response:
        """Every tenant that has a limit."""
        limits = await _limits(link)
        users = {_path_form(salt): {"limit_gb": limit, "current_usage_gb": None} for salt, limit in limits.items()}
        return reply({"users": users})

    @app.get(_PATH, response_model=api.Quota)
    async def get_limit(request: Request) -> Response:
        """The limit of one tenant; a tenant without one has 0 and does not exist."""
        salt = _salt(request)
        limits = await _limits(link)
        found = api.Quota(_path_form(salt), limits.get(salt, 0.0), None, salt in limits)
        return reply(api.to_json(found))

    @app.put(_PATH, response_model=api.QuotaChange, openapi_extra={"requestBody": _LIMIT_BODY})
    async def set_limit(request: Request) -> Response:
        """Set the limit of one tenant."""
        salt = _salt(request)
        limit_gb = _limit_gb(read_object(await read_body(request), "error"))
        await ask(link.ask, Limit(0, salt, limit_gb), Limited, "error")
        return reply({"cache_salt": _path_form(salt), "limit_gb": limit_gb, "status": "ok"})

    @app.delete(_PATH, response_model=api.QuotaChange)
    async def remove_limit(request: Request) -> Response:
        """Remove the limit of one tenant."""
        salt = _salt(request)
        limited = await ask(link.ask, Limit(0, salt, None), Limited, "error")
        return reply({"cache_salt": _path_form(salt), "status": "removed" if limited.existed else "not_found"})


async def _limits(link: CoreLink) -> dict[str, float]:
    report = await ask(link.ask, Tenants(0), Report, "error")
    limits: dict[str, float] = json.loads(report.document)["limits_gb"]
    return limits


def _salt(request: Request) -> str:
    """The tenant that the path names. Taken from the bytes that were sent, since a decoded path no longer tells
    whether a tenant is called `_default` or has no salt at all."""
    segment = bytes(request.scope["raw_path"]).split(b"?")[0].split(b"/", 2)[-1]
    if segment == api.DEFAULT_SALT.encode():
        return ""
    try:
        salt = unquote_to_bytes(segment).decode()
    except UnicodeDecodeError:
        raise Rejected(400, "the salt in the path is not UTF-8", "error") from None
    if not salt or len(salt.encode()) > SALT_BYTES_MAX:
        raise Rejected(400, f"a salt has 1 to {SALT_BYTES_MAX} bytes; {api.DEFAULT_SALT} is the empty one", "error")
    return salt


def _path_form(salt: str) -> str:
    """As upstream's answers name a tenant; one that is really called `_default` is told apart by its escaped form."""
    return salt.replace("_", "%5F") if salt == api.DEFAULT_SALT else salt or api.DEFAULT_SALT


def _limit_gb(document: dict[str, Any]) -> float:
    if document.keys() != {"limit_gb"}:
        raise Rejected(400, "the body must be {'limit_gb': number}", "error")
    limit = document["limit_gb"]
    if isinstance(limit, bool) or not isinstance(limit, (int, float)):
        raise Rejected(400, "limit_gb must be a number", "error")
    try:
        limit = float(limit)
    except OverflowError:
        limit = math.inf
    if not math.isfinite(limit):
        raise Rejected(400, "limit_gb must be finite", "error")
    if limit < 0:
        raise Rejected(400, "limit_gb must not be negative", "error")
    return limit
