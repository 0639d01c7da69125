"""What /openapi.json promises is what is answered; found with schemathesis, kept here one by one."""

from __future__ import annotations

import http.client
import json
from typing import Any

import pytest
from fastapi import FastAPI
from server_running import WAIT_S, Engines, Server

from lmcache.server.http.gate import ROLES, Access, guard
from lmcache.wire import messages as m


def test_a_route_that_is_not_in_the_table_of_roles_cannot_be_made() -> None:
    app = FastAPI()
    guard(app, Access([]))
    with pytest.raises(KeyError, match="/new"):
        app.get("/new")(lambda: "anybody's")


def send(server: Server, method: str, path: str, body: str | None = None) -> tuple[int, str | None, Any]:
    """Status, the header Allow and the JSON of one answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=WAIT_S)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.headers.get("Allow"), json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize("path", sorted({path for _, path in ROLES}))
def test_a_method_that_is_none_is_answered_by_those_there_are(shared: Server, path: str) -> None:
    expected = ", ".join(sorted(method for method, other in ROLES if other == path))
    assert send(shared, "PATCH", path.format(salt="x")) == (405, expected, {"detail": "Method Not Allowed"})


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/cache/clear", "{"),
        ("POST", "/cache/clear", "[]"),
        ("POST", "/cache/clear", '"' + "x" * 70_000 + '"'),
        ("POST", "/cache/lookup", None),
        ("POST", "/cache/lookup", '{"token_ids": []}'),
        ("POST", "/cache/lookup", '{"token_ids": [1], "model_name": "nobody\'s"}'),
        ("PUT", "/quota/x", '{"limit_gb": -1}'),
        ("PUT", "/quota/x", '{"limit_gb": 1, "more": 2}'),
        ("PUT", "/quota/" + "x" * 300, '{"limit_gb": 1}'),
        ("GET", "/quota/%ff", None),
    ],
)
def test_every_refusal_is_described(shared: Server, method: str, path: str, body: str | None) -> None:
    status, _, answer = send(shared, method, path, body)
    assert status >= 400
    described = shared.ask("/openapi.json")[1]["paths"]["/quota/{salt}" if "/quota/" in path else path]
    assert str(status) in described[method.lower()]["responses"]
    ((word, sentence),) = answer.items()
    assert word in ("detail", "error")
    assert isinstance(sentence, str)


def test_the_type_of_every_result_is_described(shared: Server) -> None:
    described = shared.ask("/openapi.json")[1]["paths"]
    for method, path in ROLES:
        content = described[path][method.lower()]["responses"]["200"]["content"]
        assert list(content) == ["text/plain" if path == "/metrics" else "application/json"]


@pytest.mark.parametrize(("limit", "status"), [("1.6e299", 200), ("1.7e299", 400), ("1e308", 400), ("1e999", 400)])
def test_a_limit_beyond_all_bytes_is_refused_and_no_fault(own: Server, limit: str, status: int) -> None:
    answer = send(own, "PUT", "/quota/x", f'{{"limit_gb": {limit}}}')
    assert answer[0] == status
    assert status == 200 or answer[2] == {"error": "limit_gb must be finite"}
    assert own.metric("faults_total") == 0


def test_token_ids_may_be_written_as_any_whole_number(own: Server, engines: Engines) -> None:
    request = m.Register(0, "scheduler", "a model", "mock 1", 0, 1, 0, namespace=bytes(32))
    engines(own, register=False).call(request)
    for written, status in (("5.0", 200), ("5e0", 200), ("5.5", 422), ("1e300", 422), ("NaN", 422), ("true", 422)):
        assert send(own, "POST", "/cache/lookup", f'{{"token_ids": [{written}]}}')[0] == status, written
