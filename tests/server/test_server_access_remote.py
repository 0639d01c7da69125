"""A server that listens on all interfaces, asked from another machine; and TLS."""

from __future__ import annotations

import contextlib
import os
import signal
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from server_running import WAIT_S, eventually, free_ports, running
from test_server_access import ask, make_tokens, start
from two_machines import HERE, THERE, Machine, may_make_machines, two_machines

from lmcache.server.http.gate import ROLES

RPC_PORT, HTTP_PORT = 5555, 8080
HELLO = f"""
from lmcache.errors import PeerRefused
from lmcache.wire import messages as m
from lmcache.wire.client import Client
with Client("tcp://{HERE}:{RPC_PORT}") as client:
    for request in (m.Hello(0, version=m.WIRE_VERSION), m.Ping(0), m.Lookup(0, keys=bytes(32)), m.Clear(0)):
        try:
            print(type(client.call(request, 30.0)).__name__)
        except PeerRefused as error:
            print(error.code, error)
"""


@pytest.fixture(scope="module")
def machines() -> Iterator[tuple[Machine, Machine]]:
    if not may_make_machines():
        pytest.skip("this user may not make a network namespace")
    with two_machines() as both:
        yield both


@pytest.fixture
def listening(machines: tuple[Machine, Machine], tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Starts a server on all interfaces of the first machine; returns its log."""
    here, _ = machines
    log_path = tmp_path / "log"
    with contextlib.ExitStack() as stack:

        def begin(*options: str) -> Path:
            words = [f"--port={RPC_PORT}", f"--http-port={HTTP_PORT}", "--l1-size-gb=0.0625", "--host=0.0.0.0"]
            words += ["--http-host=0.0.0.0", f"--attach-path={tmp_path}/sock", f"--instance-id=access-{os.getpid()}"]
            log = stack.enter_context(log_path.open("ab"))
            command = here.enter(sys.executable, "-m", "lmcache.server", *words, *options)
            # uvicorn would believe any X-Forwarded-For with the second of these
            environment = {**os.environ, "XDG_STATE_HOME": f"{tmp_path}/state", "FORWARDED_ALLOW_IPS": "*"}
            process = stack.enter_context(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
            stack.callback(process.wait, WAIT_S)
            stack.callback(process.send_signal, signal.SIGTERM)
            eventually(lambda: "engines of this machine use it" in log_path.read_text() or process.poll() is not None)
            assert process.poll() is None, log_path.read_text()
            return log_path

        yield begin


def test_without_tokens_other_machines_are_told_how_to_get_one_and_this_one_is_served(
    machines: tuple[Machine, Machine], listening: Callable[..., Path]
) -> None:
    here, there = machines
    log = listening()
    assert "HTTP answers this machine only until there is a token" in log.read_text()
    asked = [(HERE, HTTP_PORT, method, path.format(salt="x"), {}) for method, path in ROLES]
    # claiming to be somebody else is not being somebody else
    claims = {"X-Forwarded-For": "127.0.0.1", "Host": "localhost", "Authorization": "Bearer lmc_admin_" + "x" * 43}
    asked += [(HERE, HTTP_PORT, method, path.format(salt="x"), claims) for method, path in ROLES]
    for (_, _, method, path, _), (status, body) in zip(asked, there.ask(*asked), strict=True):
        if (method, path) == ("GET", "/healthcheck"):
            assert (status, body) == (200, '{"status": "healthy"}')
        else:
            assert status == 403
            assert "answers processes of its own machine only" in body
            assert "lmcache auth init" in body
            assert "--auth-file" in body
    for host in (HERE, "127.0.0.1"):
        assert [status for status, _ in here.ask((host, HTTP_PORT, "GET", "/status", {}))] == [200]
    assert f"HTTP requests turned away so far, the last one from {THERE}" in log.read_text()


def test_rpc_serves_this_machine_only_and_names_the_way_from_others(
    machines: tuple[Machine, Machine], listening: Callable[..., Path]
) -> None:
    here, there = machines
    listening()
    local = here.run(sys.executable, "-c", HELLO)
    assert [line.split()[0] for line in local.stdout.splitlines()] == ["Welcome", "Pong", "unknown", "owner"]
    remote = there.run(sys.executable, "-c", HELLO)
    lines = remote.stdout.splitlines()
    assert len(lines) == 4, remote
    for line in lines:
        assert line.startswith("remote this server serves engines of its own machine only")
        assert "run one lmcache server on each host" in line
        assert "other hosts may ask its HTTP API, with a token" in line


def test_with_tokens_other_machines_and_this_one_ask_alike(
    machines: tuple[Machine, Machine], listening: Callable[..., Path], tmp_path: Path
) -> None:
    tokens = make_tokens(tmp_path / "auth")
    log = listening("--auth-file", str(tmp_path / "auth" / "server"))
    assert "tokens of other machines travel unencrypted" in log.read_text()
    bearers = [{}, *({"Authorization": f"Bearer {tokens[role]}"} for role in ("read", "write", "admin"))]
    asked = [(HERE, HTTP_PORT, *pair, headers) for pair in ROLES for headers in bearers if pair[0] == "GET"]
    asked = [(host, port, method, path.format(salt="x"), headers) for host, port, method, path, headers in asked]
    for machine in machines:
        for (_, _, method, path, headers), (status, _) in zip(asked, machine.ask(*asked), strict=True):
            known = next((role for role in tokens if headers and headers["Authorization"].endswith(tokens[role])), None)
            open_to = {
                None: {"/healthcheck"},
                "read": {"/healthcheck", "/", "/version", "/status", "/config", "/metrics"},
            }
            open_to["write"] = open_to["read"]
            may = known == "admin" or path in open_to[known]
            assert status == (200 if may else 401 if known is None else 403), (method, path, known)


# --- TLS


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True, timeout=WAIT_S)


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cert.pem and key.pem of this machine; other.pem, another key; locked.pem, the key under a passphrase."""
    folder = tmp_path_factory.mktemp("papers")
    curve = ("-pkeyopt", "ec_paramgen_curve:P-256")
    names = f"subjectAltName=DNS:localhost,IP:127.0.0.1,IP:{HERE}"
    new = ("req", "-x509", "-newkey", "ec", *curve, "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext", names)
    openssl(folder, *new, "-keyout", "key.pem", "-out", "cert.pem")
    openssl(folder, "genpkey", "-algorithm", "EC", *curve, "-out", "other.pem")
    openssl(folder, "pkey", "-in", "key.pem", "-aes256", "-passout", "pass:hush", "-out", "locked.pem")
    for name in ("key.pem", "other.pem", "locked.pem"):
        (folder / name).chmod(0o600)
    (folder / "open.pem").write_bytes((folder / "key.pem").read_bytes())
    (folder / "open.pem").chmod(0o640)
    (folder / "nonsense.pem").write_text("nonsense")
    (folder / "nonsense.pem").chmod(0o600)
    return folder


@pytest.mark.parametrize(
    ("certificate", "key", "sentence"),
    [
        ("cert.pem", None, "--tls-cert and --tls-key go together"),
        (None, "key.pem", "--tls-cert and --tls-key go together"),
        ("cert.pem", "open.pem", "can be used by others than its owner: chmod 600"),
        ("cert.pem", "other.pem", "is not the key of"),
        ("cert.pem", "locked.pem", "is encrypted with a passphrase"),
        ("cert.pem", "nonsense.pem", "they must be PEM files"),
        ("nonsense.pem", "key.pem", "they must be PEM files"),
        ("nothing.pem", "key.pem", "--tls-cert: cannot read"),
        ("cert.pem", "nothing.pem", "--tls-key: cannot read"),
    ],
)
def test_a_certificate_or_key_that_cannot_be_used_gets_one_line(
    tmp_path: Path, papers: Path, certificate: str | None, key: str | None, sentence: str
) -> None:
    pairs = (("--tls-cert", certificate), ("--tls-key", key))
    ended = start(tmp_path, *(word for option, name in pairs if name for word in (option, str(papers / name))))
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert sentence in ended.stderr


def lmcache(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Our own command line."""
    command = [sys.executable, "-m", "lmcache_cli", *words]
    variables = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, env=variables)


def test_the_command_line_goes_through_tls_with_its_token_and_trusts_only_what_it_is_told(
    machines: tuple[Machine, Machine], listening: Callable[..., Path], papers: Path, tmp_path: Path
) -> None:
    _, there = machines
    make_tokens(tmp_path / "auth")
    options = ("--tls-cert", str(papers / "cert.pem"), "--tls-key", str(papers / "key.pem"))
    log = listening("--auth-file", str(tmp_path / "auth" / "server"), *options)
    assert f"HTTP https://0.0.0.0:{HTTP_PORT}" in log.read_text()
    assert "unencrypted" not in log.read_text()
    where = ("--url", f"https://{HERE}:{HTTP_PORT}")

    def call(*words: str, role: str | None = None, trust: tuple[str, ...] = ("--cacert", f"{papers}/cert.pem")) -> str:
        variables = {"LMCACHE_TOKEN_FILE": f"{tmp_path}/auth/{role}.token"} if role else {}
        done = there.run(sys.executable, "-m", "lmcache_cli", *words, *where, *trust, env={**os.environ, **variables})
        return f"{done.returncode} {done.stderr}{done.stdout}"

    assert call("ping", "kvcache").startswith("0 ")
    assert "HTTP 401" in call("describe", "kvcache")
    assert call("describe", "kvcache", role="read").startswith("0 ")
    assert "HTTP 403" in call("kvcache", "clear", role="read")
    assert call("kvcache", "clear", role="write").startswith("0 ")
    assert "HTTP 403" in call("quota", "set", "somebody", "--limit-gb", "1", role="write")
    assert call("quota", "set", "somebody", "--limit-gb", "1", role="admin").startswith("0 ")
    assert "1 lmcache: cannot connect" in call("describe", "kvcache", role="read", trust=())


def test_what_does_not_speak_tls_gets_no_answer_and_hurts_nobody(tmp_path: Path, papers: Path) -> None:
    options = ("--tls-cert", str(papers / "cert.pem"), "--tls-key", str(papers / "key.pem"))
    trusting = ssl.create_default_context(cafile=str(papers / "cert.pem"))

    def healthy(port: int) -> bool:
        try:
            with urllib.request.urlopen(f"https://127.0.0.1:{port}/healthcheck", timeout=WAIT_S, context=trusting) as r:
                return bool(r.status == 200)
        except OSError:
            return False

    rpc_port, http_port = free_ports()
    words = [f"--port={rpc_port}", f"--http-port={http_port}", "--l1-size-gb=0.0625", f"--attach-path={tmp_path}/x"]
    with subprocess.Popen([sys.executable, "-m", "lmcache.server", *words, *options]) as process:
        try:
            eventually(lambda: healthy(http_port) or process.poll() is not None)
            with pytest.raises(OSError):  # noqa: PT011  # which one depends on how far the other side had come
                urllib.request.urlopen(f"http://127.0.0.1:{http_port}/status", timeout=WAIT_S)
            assert healthy(http_port)
        finally:
            process.terminate()
            process.wait(WAIT_S)


def test_tokens_are_asked_of_this_machine_too(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "auth")
    with running(str(tmp_path), "--auth-file", str(tmp_path / "auth" / "server")) as server:
        assert [ask(server, "GET", "/status", token)[0] for token in (None, tokens["read"])] == [401, 200]
        url = f"http://localhost:{server.http_port}"
        assert lmcache("describe", "kvcache", "--url", url).returncode == 1
        done = lmcache("describe", "kvcache", "--url", url, LMCACHE_TOKEN=tokens["read"])
        assert (done.returncode, tokens["read"] in done.stdout + done.stderr) == (0, False)
