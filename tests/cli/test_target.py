"""What is sent with a request, and whom we trust: headers, keys, TLS, timeouts; the same for every command."""

from __future__ import annotations

import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from documents import STATUS
from serving import event_stream, json_answer, serve

Run = Callable[..., Any]
MODELS = json_answer({"data": [{"id": "m", "max_model_len": 4096}]})
STREAM = event_stream({"choices": [{"text": "a"}]})
CACHE = {"/healthcheck": json_answer({}), "/status": json_answer(STATUS), "/quota": json_answer({"users": {}})}
ENGINE = {"/health": json_answer({}), "/v1/models": MODELS, "/v1/completions": STREAM, "/metrics": json_answer({})}
TO_CACHE = ["ping kvcache", "describe kvcache", "quota list"]
TO_ENGINE = ["ping engine", "describe engine", "query engine --prompt hi"]


@pytest.mark.parametrize("words", TO_CACHE + TO_ENGINE)
def test_each_key_goes_to_its_own_kind_of_server(lmcache: Run, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("LMCACHE_TOKEN", "of-the-cache")
    monkeypatch.setenv("OPENAI_API_KEY", "of-the-engine")
    with serve(CACHE if words in TO_CACHE else ENGINE) as server:
        assert lmcache(*words.split(), "--url", server.url).status == 0
    expected = "Bearer of-the-cache" if words in TO_CACHE else "Bearer of-the-engine"
    assert {asked.headers["authorization"] for asked in server.asked} == {expected}


@pytest.mark.parametrize("words", TO_CACHE + TO_ENGINE)
def test_headers_are_sent_and_a_secret_may_lie_in_a_file(lmcache: Run, tmp_path: Path, words: str) -> None:
    (tmp_path / "secret").write_text("hush\n")
    given = ("--header", "X-One=1=2", "--header", f"Authorization=@{tmp_path / 'secret'}")
    with serve(CACHE if words in TO_CACHE else ENGINE) as server:
        assert lmcache(*words.split(), "--url", server.url, *given).status == 0
    for asked in server.asked:
        assert (asked.headers["x-one"], asked.headers["authorization"]) == ("1=2", "hush")
        assert asked.headers["user-agent"].startswith("lmcache-cli/")


@pytest.mark.parametrize("header", ["novalue", "=x", "a b=c", "X-A=ü", "X-A=a\rb", "X-A=@/nowhere/at/all"])
def test_a_header_that_is_none_is_refused_without_its_value(lmcache: Run, header: str) -> None:
    ended = lmcache("ping", "kvcache", "--url", "127.0.0.1:1", "--header", header)
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "--header" in ended.err
    assert not header.startswith("X-A=@") or "/nowhere/at/all" in ended.err


@pytest.mark.parametrize("variable", ["LMCACHE_TOKEN", "OPENAI_API_KEY"])
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(
    lmcache: Run, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "sec\rret")
    ended = lmcache("ping", "kvcache" if variable == "LMCACHE_TOKEN" else "engine", "--url", "127.0.0.1:1")
    assert ended.status == 2
    assert variable in ended.err
    assert "sec" not in ended.err.replace("seconds", "")


@pytest.mark.parametrize("url", ["{}", "http://{}", "http://{}/", "http://{}/v1", "{}/v1/"])
@pytest.mark.parametrize("words", TO_CACHE + TO_ENGINE)
def test_every_command_takes_every_spelling_of_an_address(lmcache: Run, words: str, url: str) -> None:
    with serve(CACHE if words in TO_CACHE else ENGINE) as server:
        assert lmcache(*words.split(), "--url", url.format(server.url.removeprefix("http://"))).status == 0


@pytest.mark.parametrize("words", [*TO_CACHE, *TO_ENGINE, "quota get a"])
def test_the_environment_names_the_server(lmcache: Run, monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    variable = "LMCACHE_ENGINE_URL" if words in TO_ENGINE else "LMCACHE_URL"
    with serve({**CACHE, **ENGINE, "/quota/a": json_answer({"exists": False})}) as server:
        monkeypatch.setenv(variable, server.url)
        assert lmcache(*words.split()).status == 0
    assert server.asked


# --- TLS


class _Https(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(STATUS if self.path == "/status" else {"data": [{"id": "m"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class _Server(HTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that does not trust us hangs up; that is what the test wants."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for localhost, with its key in the same file; made by openssl."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", f"{path}.key", "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    path.write_text(Path(f"{path}.key").read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
def https(certificate: Path) -> Iterator[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    httpd = _Server(("127.0.0.1", 0), _Https)
    httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"https://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    thread.join(10)
    httpd.server_close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs the openssl command")
@pytest.mark.parametrize("words", ["ping kvcache", "describe kvcache", "describe engine"])
def test_only_a_trusted_certificate_will_do(lmcache: Run, https: str, certificate: Path, words: str) -> None:
    refused = lmcache(*words.split(), "--url", https)
    assert refused.status == 1
    assert "certificate" in refused.err.lower()
    assert refused.err.count("\n") == 1
    assert lmcache(*words.split(), "--url", https, "--cacert", f"{certificate}.crt").status == 0
    assert lmcache(*words.split(), "--url", https, "--insecure").status == 0


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_authorities_that_cannot_be_read_are_wrong_usage(lmcache: Run, tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    for words in ("ping kvcache", "describe kvcache"):
        ended = lmcache(*words.split(), "--url", f"https://127.0.0.1:1{os.getpid() % 1000:03}", "--cacert", str(path))
        assert (ended.status, ended.err.count("\n")) == (2, 1)
        assert f"cannot use --cacert {path}" in ended.err
