"""The HTTP API: shapes and paths are those of ``lmcache_cli.api``; every answer comes from the core by one message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response

from lmcache.errors import PeerRefused, PeerSilent
from lmcache.server import exposition
from lmcache.server.link import CoreLink
from lmcache.wire.messages import Clear, Cleared, Report, Snapshot
from lmcache_cli import api

BODY_BYTES_MAX = 64 << 10
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


class _Rejected(Exception):
    """The request cannot be carried out: the status and the one sentence of its answer."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


def build_app(link: CoreLink, config: Mapping[str, object], version: str) -> FastAPI:
    """The application. ``config`` is what ``/config`` shows: settings only, nothing of the environment."""
    app = FastAPI(title="LMCache HTTP API", version=version, redoc_url=None)

    @app.exception_handler(_Rejected)
    async def _reject(_: Request, rejected: Exception) -> Response:
        status = rejected.status if isinstance(rejected, _Rejected) else 500
        return _json({"detail": str(rejected)}, status)

    _add_core_routes(app, link)

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


def _add_core_routes(app: FastAPI, link: CoreLink) -> None:
    unhealthy: dict[int | str, dict[str, Any]] = {503: {"model": api.Health}}

    @app.get(api.PATH_HEALTH, response_model=api.Health, responses=unhealthy)
    async def healthcheck() -> Response:
        """Whether a real message went through the core within the last second."""
        reason = await link.illness()
        if reason is not None:
            return _json(api.to_json(api.Health("unhealthy", reason)), 503)
        return _json({"status": "healthy"})

    @app.get(api.PATH_STATUS, response_model=api.Status)
    async def status() -> Response:
        """State of the core, the pool and the registered engines."""
        return _json((await _snapshot(link))["status"])

    @app.get(api.PATH_METRICS)
    async def metrics() -> Response:
        """Counters and gauges as Prometheus text."""
        document = await _snapshot(link)
        text = exposition.render(document["counters"], document["gauges"])
        return Response(text, media_type=exposition.CONTENT_TYPE)

    @app.post(api.PATH_CLEAR, response_model=api.ClearReply, openapi_extra={"requestBody": _CLEAR_BODY})
    async def clear(request: Request) -> Response:
        """Drop every entry that no lease or reservation holds."""
        wanted = _clear_request(await _read_body(request))
        reply = await _ask(link.ask, Clear(0))
        if not isinstance(reply, Cleared):
            raise _Rejected(502, "the core gave an answer to another question")
        cleared = api.Cleared(wanted.tier, reply.num_entries, reply.num_kept)
        return _json(api.to_json(api.ClearReply("ok", cleared)))


async def _snapshot(link: CoreLink) -> dict[str, Any]:
    reply = await _ask(link.ask, Snapshot(0))
    if not isinstance(reply, Report):
        raise _Rejected(502, "the core gave an answer to another question")
    document: dict[str, Any] = json.loads(reply.document)
    return document


async def _ask(ask: Callable[[Any], Awaitable[Any]], request: object) -> object:
    try:
        return await ask(request)
    except (PeerSilent, PeerRefused) as error:
        raise _Rejected(503, f"no answer from the core: {error}") from None


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > BODY_BYTES_MAX:
            raise _Rejected(413, f"a body has at most {BODY_BYTES_MAX} bytes")
    return bytes(body)


def _clear_request(body: bytes) -> api.ClearRequest:
    if not body:
        return api.ClearRequest()
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise _Rejected(400, "the body is not valid JSON") from None
    if not isinstance(document, dict):
        raise _Rejected(422, "the body must be a JSON object")
    tier = document.get("tier", "l1")
    if tier not in TIERS:
        raise _Rejected(400, f"tier {tier!r} not supported; only 'l1'")
    if not isinstance(document.get("force", False), bool):
        raise _Rejected(422, "force must be true or false")
    return api.ClearRequest(tier=tier, force=document.get("force", False))


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


class QuietServer(uvicorn.Server):
    """Waits for the order to stop instead of looking ten times a second whether there is one."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    async def main_loop(self) -> None:
        """Called by ``serve``."""
        await self._stopping.wait()

    def stop(self) -> None:
        """End within a second."""
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._stopping.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for SIGTERM and SIGINT."""
        super().handle_exit(sig, frame)
        self.stop()


def build_server(app: FastAPI) -> QuietServer:
    """One worker that is idle when nobody asks, and stops within a second."""
    return QuietServer(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
            limit_concurrency=1024,
        )
    )
