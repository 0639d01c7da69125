"""What a client can make the HTTP API do at most: the limits that keep it answering others."""

from __future__ import annotations

import http.client
import json
import os
from typing import Any
from urllib.parse import quote

from server_running import WAIT_S, Engines, Server

from lmcache.wire import messages as m


def put(server: Server, path: str, limit_gb: float = 1.0) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=WAIT_S)
    connection.request("PUT", path, json.dumps({"limit_gb": limit_gb}))
    response = connection.getresponse()
    status, body = response.status, json.loads(response.read())
    connection.close()
    return status, body


def test_limits_of_the_longest_salts_can_still_be_listed(own: Server) -> None:
    """Control characters are six bytes each in JSON: what is kept must fit into one message all the same."""
    num_kept = 0
    while True:
        salt = f"{num_kept:04d}" + "\x01" * 252
        status, body = put(own, f"/quota/{quote(salt, safe='')}")
        if status != 200:
            break
        num_kept += 1
    assert status == 409
    assert body == {"error": f"{num_kept} tenants have a limit, and no more fit: remove one first"}
    assert num_kept > 100
    assert len(own.ask("/quota")[1]["users"]) == num_kept
    assert own.healthy()


def test_a_salt_is_taken_from_the_path_however_its_folder_is_spelt(own: Server) -> None:
    assert put(own, "/%71uota/x")[1]["cache_salt"] == "x"
    assert put(own, "/quota/a%0Ab")[1]["cache_salt"] == "a\nb"
    assert set(own.ask("/quota")[1]["users"]) == {"x", "a\nb"}


def test_an_answer_that_would_list_too_many_chunks_is_refused(own: Server, engines: Engines) -> None:
    for number in range(9):
        digest = os.urandom(32)
        engines(own, register=False).call(
            m.Register(0, "scheduler", f"model {number}", "mock 1", 0, 1, 0, namespace=digest)
        )
    tokens = [1] * (8192 * 256)
    status, body = own.ask("/cache/lookup", json.dumps({"token_ids": tokens}).encode())
    assert status == 422
    assert "name a model" in body["detail"]
    body_of_one = json.dumps({"token_ids": tokens, "model_name": "model 3"}).encode()
    status, body = own.ask("/cache/lookup", body_of_one)
    assert (status, len(body["models"]), len(body["models"][0]["chunks"])) == (200, 1, 8192)
