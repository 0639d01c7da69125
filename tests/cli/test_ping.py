"""`lmcache ping`."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serving import Answer, json_answer, serve

from lmcache_cli import failures

Run = Callable[..., Any]


@contextmanager
def listening(talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """A listener that is no HTTP server: ``talk`` gets the first connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            connection, _ = listener.accept()
            with connection:
                talk(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(timeout=10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@pytest.mark.parametrize(
    ("target", "path", "title"),
    [("kvcache", "/healthcheck", "Ping KV Cache"), ("engine", "/health", "Ping Engine")],
)
def test_each_target_has_its_path_and_its_title(lmcache: Run, target: str, path: str, title: str) -> None:
    with serve({path: Answer()}) as server:
        ended = lmcache("ping", target, "--url", server.url, "--format", "json")
    document = json.loads(ended.out)
    assert ended.status == 0
    assert document["title"] == title
    assert document["metrics"]["status"] == "OK"
    assert document["metrics"]["round_trip_time_ms"] > 0
    assert [(asked.method, asked.path) for asked in server.asked] == [("GET", path)]


def test_an_engine_url_may_end_in_v1(lmcache: Run) -> None:
    with serve({"/health": Answer()}) as server:
        assert lmcache("ping", "engine", "--url", f"{server.url}/v1/").status == 0


@pytest.mark.parametrize(("target", "variable"), [("kvcache", "LMCACHE_URL"), ("engine", "LMCACHE_ENGINE_URL")])
def test_the_environment_names_the_default_server(
    lmcache: Run, monkeypatch: pytest.MonkeyPatch, target: str, variable: str
) -> None:
    with serve({"/healthcheck": Answer(), "/health": Answer()}) as server:
        monkeypatch.setenv(variable, server.url)
        assert lmcache("ping", target).status == 0
    assert len(server.asked) == 1


def test_a_server_that_is_not_there_is_a_fail_in_both_forms(process: Run) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    ended = process("ping", "kvcache", "--url", url)
    assert ended.status == 1
    assert ended.out.splitlines()[1].split() == ["Status:", "FAIL"]
    assert ended.out.splitlines()[2].split()[-1] == "N/A"
    assert ended.err == f"lmcache: cannot connect to {url}: Connection refused\n"

    ended = process("ping", "kvcache", "--url", url, "--format", "json")
    assert ended.status == 1
    assert json.loads(ended.out) == {
        "title": "Ping KV Cache",
        "metrics": {"status": "FAIL", "round_trip_time_ms": None},
        "error": {"code": "unreachable", "message": f"cannot connect to {url}: Connection refused"},
    }


@pytest.mark.parametrize("status", [204, 302, 401, 404, 500, 503])
def test_any_answer_but_200_is_a_fail(lmcache: Run, status: int) -> None:
    with serve({"/healthcheck": Answer(status)}) as server:
        ended = lmcache("ping", "kvcache", "--url", server.url, "--format", "json")
    assert ended.status == 1
    assert json.loads(ended.out)["error"]["code"] == f"http_{status}"


def test_the_reason_of_an_unhealthy_server_is_passed_on(lmcache: Run) -> None:
    with serve({"/healthcheck": json_answer({"status": "unhealthy", "reason": "the core is silent"}, 503)}) as server:
        ended = lmcache("ping", "kvcache", "--url", server.url)
    assert ended.err == f"lmcache: HTTP 503 Service Unavailable from {server.url}/healthcheck: the core is silent\n"


def test_a_reason_cannot_steer_the_terminal_nor_take_a_second_line(lmcache: Run) -> None:
    with serve({"/healthcheck": json_answer({"reason": "a\nb\x1b[2Jc\u202ed"}, 503)}) as server:
        ended = lmcache("ping", "kvcache", "--url", server.url)
    assert ended.err.endswith("a\\nb\\x1b[2Jc\\u202ed\n")
    assert ended.err.count("\n") == 1


def test_quiet_leaves_only_the_exit_status_on_stdout(lmcache: Run) -> None:
    with serve({"/healthcheck": Answer()}) as server:
        ended = lmcache("ping", "kvcache", "--url", server.url, "-q")
    assert (ended.status, ended.out, ended.err) == (0, "", "")
    assert lmcache("ping", "kvcache", "--url", server.url, "--quiet").out == ""


def test_what_does_not_speak_http_is_named(lmcache: Run) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL\n")
        connection.recv(4096)

    with listening(greet) as url:
        ended = lmcache("ping", "kvcache", "--url", url)
    assert (ended.status, ended.err) == (1, f"lmcache: {url} does not answer in HTTP\n")


def test_silence_on_the_rpc_port_names_the_http_port() -> None:
    said = str(failures.timed_out("http://host:5555/healthcheck", 10))
    assert said.endswith("did not answer within 10 s (5555 is the RPC port; HTTP is on 8080 unless set otherwise)")
    assert "RPC" not in str(failures.timed_out("http://host:8080/healthcheck", 10))


def test_a_server_that_hangs_up_is_a_fail(lmcache: Run) -> None:
    with listening(lambda connection: connection.recv(4096) and None) as url:
        ended = lmcache("ping", "kvcache", "--url", url)
    assert ended.status == 1
    assert "closed the connection without a complete answer" in ended.err


def test_a_server_that_drips_is_given_up_as_a_whole(lmcache: Run) -> None:
    stop = threading.Event()

    def drip(connection: socket.socket) -> None:
        connection.recv(4096)
        while not stop.wait(0.05):
            connection.sendall(b"H")

    with listening(drip) as url:
        ended = lmcache("ping", "kvcache", "--url", url, "--format", "json", "--timeout", "0.3")
        stop.set()
    assert ended.status == 1
    assert json.loads(ended.out)["error"]["code"] == "timeout"
    assert "did not answer within 0.3 s" in ended.err


def test_a_proxy_is_never_used_for_this_machine(lmcache: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"/healthcheck": Answer()}) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
        assert lmcache("ping", "kvcache", "--url", server.url).status == 0


def test_a_proxy_is_used_for_other_machines(lmcache: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve({"http://cache.example:8080/healthcheck": Answer()}) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert lmcache("ping", "kvcache", "--url", "cache.example:8080").status == 0
        monkeypatch.setenv("no_proxy", "127.0.0.1,cache.invalid")
        assert lmcache("ping", "kvcache", "--url", "cache.invalid:8080").status == 1
    assert [asked.path for asked in proxy.asked] == ["http://cache.example:8080/healthcheck"]
