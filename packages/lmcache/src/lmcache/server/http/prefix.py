"""/cache/lookup: which chunks of a prompt are held, for which model. Nothing is moved, kept or counted by asking."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response

from lmcache.keys import extend, pack_tokens, request_namespace
from lmcache.server.http.replies import Bodies, Rejected, ask, read_object, reply
from lmcache.server.link import CoreLink
from lmcache.server.tenants import SALT_BYTES_MAX
from lmcache.wire.messages import KEYS_MAX, Held, Peek, Report, Tenants
from lmcache_cli import api

if TYPE_CHECKING:
    from lmcache.cascade.run import Cascade

LOOKUP_BYTES_MAX = 16 << 20
PLACES_MAX = 65_536
TIER = "l1"

_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["token_ids"],
                "properties": {
                    "token_ids": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"type": "integer", "minimum": 0, "maximum": (1 << 32) - 1},
                    },
                    "model_name": {"type": ["string", "null"]},
                    "cache_salt": {"type": "string", "default": "", "maxLength": SALT_BYTES_MAX},
                },
            }
        }
    },
}


def add_routes(app: FastAPI, link: CoreLink, cascade: Cascade | None, chunk_tokens: int) -> None:
    """Add the one route."""
    bodies = Bodies()

    async def answer(body: bytes) -> Response:
        # Long prompts take many milliseconds at each step, and others are being served.
        asked = await asyncio.to_thread(lambda: _read(read_object(body), chunk_tokens))
        report = await ask(link.ask, Tenants(0), Report)
        known: list[dict[str, Any]] = json.loads(report.document)["known"]
        if asked.model_name is not None:
            names = sorted({item["model"] for item in known})
            known = [item for item in known if item["model"] == asked.model_name]
            if not known:
                met = f"it has met {', '.join(names)}" if names else "it has met none"
                raise Rejected(404, f"no engine with the model {asked.model_name} has registered here: {met}")
        if len(known) * (len(asked.token_ids) // chunk_tokens) > PLACES_MAX:
            raise Rejected(
                422,
                f"an answer lists at most {PLACES_MAX} chunks, of all models together: name a model, or ask for less",
            )
        packed = await asyncio.to_thread(pack_tokens, asked.token_ids)
        models = [await _prefix(link, cascade, item, packed, asked.cache_salt, chunk_tokens) for item in known]
        found = api.LookupReply(chunk_tokens, len(asked.token_ids), models)
        return await asyncio.to_thread(lambda: reply(api.to_json(found)))

    @app.post(api.PATH_LOOKUP, openapi_extra={"requestBody": _BODY})
    async def lookup(request: Request) -> Response:
        """Which whole chunks of these tokens are held, for every model whose engine has registered."""
        async with bodies.read(request, LOOKUP_BYTES_MAX) as body:
            return await answer(body)


async def _prefix(
    link: CoreLink, cascade: Cascade | None, known: dict[str, Any], packed: bytes, salt: str, chunk_tokens: int
) -> api.ModelPrefix:
    parent = request_namespace(bytes.fromhex(known["namespace"]), salt, {}, chunk_tokens)
    keys = await asyncio.to_thread(extend, parent, packed, chunk_tokens)
    tiers: list[str | None] = []
    if keys:
        assert len(keys) <= KEYS_MAX
        states = (await ask(link.ask, Peek(0, b"".join(keys)), Held)).states
        tiers = [TIER if state else None for state in states]
        missing = [index for index, tier in enumerate(tiers) if tier is None]
        if cascade is not None and missing:
            for index, name in zip(missing, await cascade.names_of([keys[i] for i in missing]), strict=True):
                tiers[index] = name
    chunks = [api.ChunkPlace(index, index * chunk_tokens, chunk_tokens, tier) for index, tier in enumerate(tiers)]
    num_held = tiers.index(None) if None in tiers else len(tiers)
    return api.ModelPrefix(known["model"], known["engine"], known["world_size"], num_held * chunk_tokens, chunks)


def _read(document: dict[str, Any], chunk_tokens: int) -> api.LookupRequest:
    tokens, model, salt = document.get("token_ids"), document.get("model_name"), document.get("cache_salt", "")
    if not isinstance(tokens, list) or not tokens:
        raise Rejected(422, "token_ids must be a list of at least one token id")
    if len(tokens) > KEYS_MAX * chunk_tokens:
        raise Rejected(413, f"a look-up takes at most {KEYS_MAX * chunk_tokens} tokens")
    if not _are_token_ids(tokens):
        # 5.0 is a whole number to JSON Schema
        tokens = [int(token) if type(token) is float and token.is_integer() else token for token in tokens]
        if not _are_token_ids(tokens):
            raise Rejected(422, "token_ids must be whole numbers from 0 to 4294967295")
    if model is not None and not isinstance(model, str):
        raise Rejected(422, "model_name must be a text or null")
    if not isinstance(salt, str) or len(salt.encode("utf-8", "replace")) > SALT_BYTES_MAX:
        raise Rejected(422, f"cache_salt must be a text of at most {SALT_BYTES_MAX} bytes")
    return api.LookupRequest(tokens, model, salt)


def _are_token_ids(tokens: list[Any]) -> bool:
    return all(type(token) is int and 0 <= token < 1 << 32 for token in tokens)
