"""/quota: how much of L1, and of each tier that can count it, a tenant may take, and takes."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote_to_bytes

from fastapi import FastAPI, Request, Response
from starlette.convertors import Convertor, register_url_convertor

from lmcache.config import GB
from lmcache.errors import ConfigError
from lmcache.server.http.replies import Rejected, ask, read_body, read_object, reply
from lmcache.server.limits_file import LimitsFile
from lmcache.server.link import CoreLink
from lmcache.server.tenants import SALT_BYTES_MAX
from lmcache.wire.messages import Limit, Limited, Report, Tenants
from lmcache_cli import api

if TYPE_CHECKING:
    from lmcache.cascade.run import Cascade

_LIMIT_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["limit_gb"],
                "additionalProperties": False,
                "properties": {"limit_gb": {"type": "number", "minimum": 0, "maximum": sys.float_info.max / GB}},
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


class Keeper:
    """Changes limits in the core and in their file, one change at a time."""

    def __init__(self, link: CoreLink, file: LimitsFile) -> None:
        self._link = link
        self._file = file
        self._turn = asyncio.Lock()

    async def change(self, salt: str, limit_gb: float | None) -> bool:
        """Set or remove a limit, so that it outlives the server; returns whether there was one.

        Raises:
            Rejected: it cannot be kept, and was not changed.
        """
        async with self._turn:
            before = (await _tenants(self._link, None))["limits_gb"]
            limited = await ask(self._link.ask, Limit(0, salt, limit_gb), Limited, "error")
            after = {name: limit for name, limit in before.items() if name != salt}
            if limit_gb is not None:
                after[salt] = limit_gb
            if after != before:
                try:
                    await asyncio.to_thread(self._file.save, after)
                except ConfigError as error:
                    await ask(self._link.ask, Limit(0, salt, before.get(salt)), Limited, "error")
                    raise Rejected(503, f"{error}; nothing was changed", "error") from None
            return limited.existed


def add_routes(app: FastAPI, link: CoreLink, cascade: Cascade | None, file: LimitsFile) -> None:
    """Add the four verbs."""
    keeper = Keeper(link, file)

    @app.get(api.PATH_QUOTA)
    async def list_limits() -> Response:
        """Every tenant that has a limit."""
        document = await _tenants(link, None)
        tiers = await _tier_bytes(cascade)
        users = {
            _path_form(salt): api.QuotaUser(limit, *_usage(salt, document, tiers))
            for salt, limit in document["limits_gb"].items()
        }
        return reply(api.to_json(api.QuotaList(users)))

    @app.get(_PATH)
    async def get_limit(request: Request) -> Response:
        """The limit of one tenant; a tenant without one has 0 and does not exist."""
        salt = _salt(request)
        document = await _tenants(link, salt)
        limits = document["limits_gb"]
        usage = _usage(salt, document, await _tier_bytes(cascade))
        found = api.Quota(_path_form(salt), limits.get(salt, 0.0), *usage, salt in limits)
        return reply(api.to_json(found))

    @app.put(_PATH, openapi_extra={"requestBody": _LIMIT_BODY})
    async def set_limit(request: Request) -> Response:
        """Set the limit of one tenant."""
        salt = _salt(request)
        limit_gb = _limit_gb(read_object(await read_body(request), "error"))
        await keeper.change(salt, limit_gb)
        return reply({"cache_salt": _path_form(salt), "limit_gb": limit_gb, "status": "ok"})

    @app.delete(_PATH)
    async def remove_limit(request: Request) -> Response:
        """Remove the limit of one tenant."""
        salt = _salt(request)
        existed = await keeper.change(salt, None)
        return reply({"cache_salt": _path_form(salt), "status": "removed" if existed else "not_found"})


async def _tenants(link: CoreLink, salt: str | None) -> dict[str, Any]:
    report = await ask(link.ask, Tenants(0, salt), Report, "error")
    document: dict[str, Any] = json.loads(report.document)
    return document


async def _tier_bytes(cascade: Cascade | None) -> dict[str, dict[bytes, int]]:
    """By tier, and there by tenant; tiers that cannot tell are left out."""
    states = [] if cascade is None else await cascade.states()
    return {state.name: state.usage.tenant_bytes for state in states if state.usage.tenant_bytes is not None}


def _usage(salt: str, document: dict[str, Any], tiers: dict[str, dict[bytes, int]]) -> tuple[float, dict[str, float]]:
    """GB of L1, and of L1 and each tier."""
    l1_gb = document["used_bytes"][salt] / GB
    tenant = bytes.fromhex(document["ids"][salt])
    return l1_gb, {"l1": l1_gb, **{name: used.get(tenant, 0) / GB for name, used in tiers.items()}}


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
    if not math.isfinite(limit * GB):
        raise Rejected(400, "limit_gb must be finite", "error")
    if limit < 0:
        raise Rejected(400, "limit_gb must not be negative", "error")
    return limit
