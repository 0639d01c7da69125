"""The description of the API (/openapi.json): what the routes cannot say of themselves."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI

from lmcache.server.http.gate import ROLES
from lmcache_cli import api

_SALT = f"{api.PATH_QUOTA}/{{salt}}"
_REASONS = {
    "400": "The body or the path cannot be read",
    "401": "No token, or not one of this server's",
    "403": "Not from here, or not with this role",
    "404": "No engine with this model has registered",
    "409": "A limit of the server is reached",
    "413": "The body is too long",
    "422": "The body is not what is asked for",
    "503": "The core does not answer",
}
_ANSWERS = {
    ("GET", api.PATH_STATUS): ("503",),
    ("GET", api.PATH_METRICS): ("503",),
    ("POST", api.PATH_LOOKUP): ("400", "404", "413", "422", "503"),
    ("POST", api.PATH_CLEAR): ("400", "413", "422", "503"),
    ("GET", api.PATH_QUOTA): ("503",),
    ("GET", _SALT): ("400", "503"),
    ("PUT", _SALT): ("400", "409", "413", "503"),
    ("DELETE", _SALT): ("400", "503"),
}
"""What each endpoint answers besides its result, refusals for want of a role apart."""

_RESULTS = {
    ("GET", api.PATH_HEALTH): api.Health,
    ("GET", api.PATH_STATUS): api.Status,
    ("POST", api.PATH_LOOKUP): api.LookupReply,
    ("POST", api.PATH_CLEAR): api.ClearReply,
    ("GET", api.PATH_QUOTA): api.QuotaList,
    ("GET", _SALT): api.Quota,
    ("PUT", _SALT): api.QuotaChange,
    ("DELETE", _SALT): api.QuotaChange,
}
"""What an endpoint answers with 200. Told here and not to the routes, which would have them analysed at every start."""

_SALT_PARAMETER = {
    "name": "salt",
    "in": "path",
    "required": True,
    "description": f"The tenant; {api.DEFAULT_SALT} is the one of requests without a salt.",
    "schema": {"type": "string", "minLength": 1},
}
_SENTENCE = {
    "type": "object",
    "properties": {"detail": {"type": "string"}, "error": {"type": "string"}},
    "minProperties": 1,
}


class DescribedApp(FastAPI):
    """An application whose description says what it refuses, and what it asks of whom."""

    def openapi(self) -> dict[str, Any]:
        """The description, made once."""
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()
        self._add_results(document)
        has_tokens = bool(self.state.access.tokens)
        if has_tokens:
            scheme = {"type": "http", "scheme": "bearer", "description": "A token made by `lmcache auth init`."}
            document["components"]["securitySchemes"] = {"token": scheme}
        for (method, path), role in ROLES.items():
            operation = document["paths"][path][method.lower()]
            statuses = list(_ANSWERS.get((method, path), ()))
            if role is not None:
                statuses += ["401", "403"] if has_tokens else ["403"]
                if has_tokens:
                    operation["security"] = [{"token": []}]
                    operation["x-role"] = str(role)
            for status in sorted(statuses):
                content = {"application/json": {"schema": _SENTENCE}}
                operation["responses"][status] = {"description": _REASONS[status], "content": content}
            if path == _SALT:
                operation["parameters"] = [_SALT_PARAMETER]
        return document

    def _add_results(self, document: dict[str, Any]) -> None:
        from pydantic import TypeAdapter

        mode: Literal["serialization"] = "serialization"
        models: list[type[Any]] = list(dict.fromkeys(_RESULTS.values()))
        inputs = [(model.__name__, mode, TypeAdapter(model)) for model in models]
        schemas, definitions = TypeAdapter.json_schemas(inputs, ref_template="#/components/schemas/{model}")
        document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
        for (method, path), model in _RESULTS.items():
            content = {"application/json": {"schema": schemas[model.__name__, mode]}}
            responses = document["paths"][path][method.lower()]["responses"]
            responses["200"] = {"description": "Successful Response", "content": content}
            if model is api.Health:
                responses["503"] = {"description": _REASONS["503"], "content": content}
