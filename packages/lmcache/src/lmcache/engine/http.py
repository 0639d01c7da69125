"""The engine's OpenAI-compatible HTTP API; shapes are in ``protocol``, computing in ``runner``."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector, CollectorRegistry

from lmcache.engine import protocol
from lmcache.engine.logprobs import Score
from lmcache.engine.models import Served
from lmcache.engine.protocol import Rejected, Writer
from lmcache.engine.runner import Event, Failed, Finished, Job, Piece, Runner
from lmcache.server.http import QuietServer, build_server
from lmcache_cli import api

METRICS_PREFIX = "lmcache_engine_"
PATH_TOKENIZE = "/tokenize"
PATH_METRICS = "/metrics"


def build_app(served: Served, runner: Runner, max_model_len: int, version: str) -> FastAPI:
    """The application."""
    app = FastAPI(title="LMCache engine", version=version, redoc_url=None)
    created = int(time.time())

    @app.exception_handler(Rejected)
    async def _reject(_: Request, error: Exception) -> Response:
        assert isinstance(error, Rejected)
        return _json(error.document, error.status)

    @app.get(api.ENGINE_PATH_HEALTH)
    async def health() -> Response:
        """Whether requests are computed."""
        return Response(status_code=200 if runner.alive else 503)

    @app.get(api.ENGINE_PATH_MODELS)
    async def models() -> Response:
        """The one model that is served."""
        card = {
            "id": served.name,
            "object": "model",
            "created": created,
            "owned_by": "lmcache",
            "root": served.name,
            "parent": None,
            "max_model_len": max_model_len,
        }
        return _json({"object": "list", "data": [card]})

    @app.post(PATH_TOKENIZE)
    async def tokenize(request: Request) -> Response:
        """Token ids of a prompt or of messages."""
        document = protocol.parse_json(await _read_body(request))
        tokens = await asyncio.to_thread(protocol.parse_tokenize, document, served)
        return _json({"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": None})

    @app.get(PATH_METRICS)
    async def metrics() -> Response:
        """Counters and gauges as Prometheus text."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Metrics(runner))
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.post(api.ENGINE_PATH_COMPLETIONS)
    async def completions(request: Request) -> Response:
        """Continue a prompt."""
        return await _complete(request, served, runner, max_model_len, is_chat=False)

    @app.post(api.ENGINE_PATH_CHAT)
    async def chat(request: Request) -> Response:
        """Continue a conversation."""
        return await _complete(request, served, runner, max_model_len, is_chat=True)

    return app


class EngineServer(QuietServer):
    """Ends the generations first when it is to stop, so that every client hears of it."""

    def __init__(self, app: FastAPI, runner: Runner) -> None:
        super().__init__(build_server(app).config)
        self._runner = runner

    def stop(self) -> None:
        """End within a second and a step of the model."""
        self._loop.call_soon_threadsafe(self._runner.stop)
        super().stop()


async def _complete(request: Request, served: Served, runner: Runner, max_model_len: int, is_chat: bool) -> Response:
    document = protocol.parse_json(await _read_body(request))
    # On another thread: the tokens of a long prompt take a while, and streams must not wait for them.
    wanted = await asyncio.to_thread(protocol.parse_completion, document, served, max_model_len, is_chat)
    if not runner.alive:
        raise Rejected("the engine has stopped computing", 503)
    writer = Writer(wanted, uuid.uuid4().hex, served.tokenizer)
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

    def tell(event: Event) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits any more
            loop.call_soon_threadsafe(events.put_nowait, event)

    job = Job(wanted.ask, tell)
    if not runner.submit(job):
        raise Rejected(f"{runner.waiting} requests wait already; try again later", 503)
    if wanted.stream:
        return StreamingResponse(_stream(job, events, writer, wanted.with_usage), media_type="text/event-stream")
    return await _whole(request, job, events, writer)


async def _stream(job: Job, events: asyncio.Queue[Event], writer: Writer, with_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events, each at the moment its text is certain. Closed early when the client is gone."""
    scores: list[Score] = []
    try:
        first = True
        while not isinstance(event := await events.get(), Finished | Failed):
            if event.score is not None:
                scores.append(event.score)
            if event.text:
                yield _event(writer.piece(event.text, scores, first=first))
                first, scores = False, []
        if isinstance(event, Failed):
            yield _event(Rejected(event.message, 500).document)
            return
        yield _event(writer.piece("", scores, first=first, reason=event.reason))
        if with_usage:
            yield _event(writer.last(writer.usage(event.output_tokens, event.cached_tokens)))
        yield b"data: [DONE]\n\n"
    finally:
        job.cancelled.set()


async def _whole(request: Request, job: Job, events: asyncio.Queue[Event], writer: Writer) -> Response:
    gone = asyncio.create_task(_gone(request))
    texts: list[str] = []
    scores: list[Score] = []
    try:
        while True:
            coming = asyncio.create_task(events.get())
            await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                coming.cancel()
                return Response(status_code=499)  # nobody reads it
            event = coming.result()
            if isinstance(event, Piece):
                texts.append(event.text)
                if event.score is not None:
                    scores.append(event.score)
            elif isinstance(event, Failed):
                raise Rejected(event.message, 500)
            else:
                usage = writer.usage(event.output_tokens, event.cached_tokens)
                return _json(writer.whole(texts, scores, event.reason, usage))
    finally:
        job.cancelled.set()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > protocol.BODY_BYTES_MAX:
            raise Rejected(f"a body has at most {protocol.BODY_BYTES_MAX} bytes", 413)
    return bytes(body)


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _json(value: object, status: int = 200) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


class _Metrics(Collector):
    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def collect(self) -> Any:
        """All families, as things are now."""
        counts = self._runner.counts
        for name, meaning, value in (
            ("requests_running", "Requests computed now", counts.running),
            ("requests_waiting", "Requests in the queue", self._runner.waiting),
            ("cache_attached", "1 while an LMCache server is there", int(self._runner.attached)),
        ):
            yield GaugeMetricFamily(METRICS_PREFIX + name, meaning, value=value)
        requests = CounterMetricFamily(METRICS_PREFIX + "requests", "Requests that have ended", labels=["outcome"])
        for outcome in ("finished", "cancelled", "failed", "refused"):
            requests.add_metric([outcome], getattr(counts, outcome))
        yield requests
        for name, meaning, value in (
            ("prompt_tokens", "Tokens of prompts", counts.prompt_tokens),
            ("prompt_tokens_cached", "Of these, taken from the cache", counts.cached_tokens),
            ("generation_tokens", "Tokens generated", counts.output_tokens),
        ):
            yield CounterMetricFamily(METRICS_PREFIX + name, meaning, value=value)
