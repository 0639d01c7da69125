"""The application, and the routes about the server as a whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse
from starlette.routing import Match, Route

from lmcache.server.http import prefix, tenancy, tier_views
from lmcache.server.http.description import DescribedApp
from lmcache.server.http.gate import Access, guard, is_known
from lmcache.server.http.replies import Rejected, ask, read_body, read_object, reply
from lmcache.server.limits_file import LimitsFile
from lmcache.server.link import CoreLink
from lmcache.wire.messages import Clear, Cleared, Report, Snapshot
from lmcache_cli import api

if TYPE_CHECKING:
    from lmcache.cascade.run import Cascade

TIERS = ("l1",)

_CLEAR_BODY = {
    "required": False,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "tier": {"type": "string", "enum": list(TIERS), "default": "l1"},
                    "force": {"type": "boolean", "default": False},
                },
            }
        }
    },
}


def build_app(
    link: CoreLink,
    cascade: Cascade | None,
    limits: LimitsFile,
    config: Mapping[str, object],
    chunk_tokens: int,
    version: str,
    access: Access,
) -> DescribedApp:
    """The application. ``config`` is what ``/config`` shows: settings only, nothing of the environment."""
    app = DescribedApp(title="LMCache HTTP API", version=version, redoc_url=None)
    guard(app, access)

    @app.exception_handler(Rejected)
    async def _reject(_: Request, rejected: Exception) -> Response:
        assert isinstance(rejected, Rejected)
        return reply({rejected.word: str(rejected)}, rejected.status)

    @app.exception_handler(405)
    async def _other_method(request: Request, _: Exception) -> Response:
        found = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
        methods = {method for route in found if isinstance(route, Route) for method in route.methods or ()}
        answer = reply({"detail": "Method Not Allowed"}, 405)
        answer.headers["Allow"] = ", ".join(sorted(methods))
        return answer

    _add_core_routes(app, link, cascade, access)
    tenancy.add_routes(app, link, cascade, limits)
    prefix.add_routes(app, link, cascade, chunk_tokens)

    @app.get(api.PATH_ROOT)
    async def root() -> dict[str, str]:
        """What answers here."""
        return {"status": "ok", "service": "LMCache HTTP API"}

    @app.get(api.PATH_VERSION)
    async def software_version() -> str:
        """Version of the server's package."""
        return version

    @app.get(api.PATH_CONFIG)
    async def settings() -> dict[str, Any]:
        """The settings the server runs with."""
        return dict(config)

    return app


def _add_core_routes(app: DescribedApp, link: CoreLink, cascade: Cascade | None, access: Access) -> None:
    @app.get(api.PATH_HEALTH)
    async def healthcheck(request: Request) -> Response:
        """Whether a real message went through the core within the last second; why not is told to nobody unknown."""
        reason = await link.illness()
        if reason is not None:
            return reply(api.to_json(api.Health("unhealthy", reason if is_known(request) else None)), 503)
        return reply({"status": "healthy"})

    @app.get(api.PATH_STATUS)
    async def status() -> Response:
        """State of the core, the pool and the registered engines."""
        status = (await _snapshot(link))["status"]
        if cascade is not None:
            states = await cascade.states()
            status["storage_manager"]["l2_adapters"] = [api.to_json(tier_views.adapter(state)) for state in states]
            status["quarantined"] = tier_views.with_quarantined(status["quarantined"], states)
        return reply(status)

    @app.get(api.PATH_METRICS, response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Counters and gauges as Prometheus text."""
        from lmcache.server import exposition  # with the first scrape: its library would cost the start 8 ms

        document = await _snapshot(link)
        document["counters"]["http_refused"] = access.num_refused
        states = [] if cascade is None else await cascade.states()
        text = exposition.render(document["counters"], document["gauges"], states)
        return Response(text, media_type=exposition.CONTENT_TYPE)

    @app.post(api.PATH_CLEAR, openapi_extra={"requestBody": _CLEAR_BODY})
    async def clear(request: Request) -> Response:
        """Drop every entry that no lease or reservation holds."""
        wanted = _clear_request(await read_body(request))
        done = await ask(link.ask, Clear(0), Cleared)
        cleared = api.Cleared(wanted.tier, done.num_entries, done.num_kept)
        return reply(api.to_json(api.ClearReply("ok", cleared)))


async def _snapshot(link: CoreLink) -> dict[str, Any]:
    report = await ask(link.ask, Snapshot(0), Report)
    document: dict[str, Any] = json.loads(report.document)
    return document


def _clear_request(body: bytes) -> api.ClearRequest:
    if not body:
        return api.ClearRequest()
    document = read_object(body)
    tier = document.get("tier", "l1")
    if tier not in TIERS:
        raise Rejected(400, f"tier {tier!r} not supported; only 'l1'")
    if not isinstance(document.get("force", False), bool):
        raise Rejected(422, "force must be true or false")
    return api.ClearRequest(tier=tier, force=document.get("force", False))
