"""Who may do what over HTTP: tokens, roles, and what a server without tokens answers."""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from server_running import WAIT_S, Server, eventually, free_ports, running

from lmcache.errors import ConfigError
from lmcache.server import access
from lmcache.server.access import Role, Token
from lmcache.server.addresses import LocalAddresses
from lmcache.server.http.gate import ROLES

STRANGERS = ("no token", "wrong token")
HEALTH = "/healthcheck"


def make_tokens(folder: Path) -> dict[str, str]:
    """`lmcache auth init`, and the token of each role."""
    command = [sys.executable, "-m", "lmcache_cli", "auth", "init", "--out", str(folder)]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)
    return {role: (folder / f"{role}.token").read_text().strip() for role in ("read", "write", "admin")}


def ask(
    server: Server, method: str, path: str, token: str | None = None, body: str | None = None, **headers: str
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body of one request; names of ``headers`` with underscores."""
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    if token is not None:
        sent["Authorization"] = f"Bearer {token}"
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=WAIT_S)
    try:
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        return response.status, dict(response.headers), response.read().decode()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "auth"


@pytest.fixture(scope="module")
def tokens(keys: Path) -> dict[str, str]:
    return make_tokens(keys)


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, keys: Path, tokens: dict[str, str]
) -> Iterator[tuple[Server, dict[str, str]]]:
    """A server that asks for tokens, and what each kind of visitor presents."""
    presented = {**tokens, "wrong token": "lmc_admin_" + "x" * 43}
    with running(str(tmp_path_factory.mktemp("guarded")), "--auth-file", str(keys / "server")) as server:
        yield server, presented


Guarded = tuple[Server, dict[str, str]]


# --- roles


@pytest.mark.parametrize("visitor", [*STRANGERS, "read", "write", "admin"])
@pytest.mark.parametrize(("method", "path"), sorted(ROLES))
def test_every_endpoint_asks_for_its_role_and_no_more(guarded: Guarded, method: str, path: str, visitor: str) -> None:
    server, presented = guarded
    needed = ROLES[method, path]
    body = {"PUT": '{"limit_gb": 1}', "POST": '{"token_ids": [1]}' if "lookup" in path else "{}"}.get(method)
    status, headers, text = ask(server, method, path.format(salt="somebody"), presented.get(visitor), body)
    if needed is None:
        assert status == 200
    elif visitor in STRANGERS:
        assert (status, headers["www-authenticate"]) == (401, "Bearer")
    elif Role[visitor.upper()] < needed:
        assert (status, f"of the role {needed}; yours has the role {visitor}" in text) == (403, True)
    else:
        assert status == 200, text


def test_readers_cannot_clear_and_writers_cannot_administer() -> None:
    assert ROLES["POST", "/cache/clear"] == Role.WRITE
    quota = {role for (_, path), role in ROLES.items() if path.startswith("/quota")}
    assert quota == {Role.ADMIN}
    assert [pair for pair, role in ROLES.items() if role is None] == [("GET", HEALTH)]


def test_the_description_names_every_endpoint_of_the_table_and_its_role(guarded: Guarded) -> None:
    server, presented = guarded
    document = json.loads(ask(server, "GET", "/openapi.json", presented["read"])[2])
    described = {(m.upper(), path): item for path, items in document["paths"].items() for m, item in items.items()}
    assert described.keys() == ROLES.keys()
    for pair, item in described.items():
        role = ROLES[pair]
        assert item.get("x-role") == (None if role is None else str(role))
        assert item.get("security") == (None if role is None else [{"token": []}])
        assert ({"401", "403"} <= item["responses"].keys()) is (role is not None)
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def test_without_tokens_the_description_asks_for_none(shared: Server) -> None:
    document = shared.ask("/openapi.json")[1]
    assert "securitySchemes" not in document["components"]
    assert not any("security" in item for items in document["paths"].values() for item in items.values())


@pytest.mark.parametrize("visitor", ["no token", "write"])
@pytest.mark.parametrize("path", ["/%71uota/x", "//quota/x", "/quota/x/../y", "/quota%2Fx", "/quota/"])
def test_no_spelling_of_a_path_opens_what_needs_another_role(guarded: Guarded, path: str, visitor: str) -> None:
    server, presented = guarded
    assert ask(server, "DELETE", path, presented.get(visitor))[0] in (401, 403, 404)
    assert ask(server, "GET", path, presented.get(visitor))[0] in (401, 403, 404, 307)


def test_what_does_not_exist_is_hidden_from_strangers(guarded: Guarded) -> None:
    server, presented = guarded
    for path in ("/nothing", "/docs", "/openapi.json", "/healthcheck/", "/HEALTHCHECK"):
        assert ask(server, "GET", path)[0] == 401
    assert ask(server, "POST", HEALTH)[0] == 401
    assert ask(server, "GET", "/nothing", presented["read"])[0] == 404
    assert ask(server, "GET", "/docs", presented["read"])[0] == 200


# --- what is presented


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer ",
        "{admin}",
        "Basic {admin}",
        "Bearer{admin}",
        "Bearer {admin}x",
        "Bearer x{admin}",
        "Bearer {short}",
        "Bearer {admin} {admin}",
        "Bearer {admin},Bearer {admin}",
        "Bearer {upper}",
        "Bearer {digest}",
        "Bearer sha256:{digest}",
        "Bearer \xff\xfe",
        "Bearer " + "x" * 40_000,
    ],
)
def test_what_is_not_a_token_opens_nothing(guarded: Guarded, value: str) -> None:
    server, presented = guarded
    admin = presented["admin"]
    digest = hashlib.sha256(admin.encode()).hexdigest()
    value = value.format(admin=admin, short=admin[:-1], upper=admin.upper(), digest=digest)
    status, headers, _ = ask(server, "GET", "/status", Authorization=value)
    assert (status, headers["www-authenticate"]) == (401, "Bearer")


def test_the_scheme_is_read_in_any_case_and_a_second_header_spoils_the_first(guarded: Guarded) -> None:
    server, presented = guarded
    for scheme in ("bearer", "BEARER", "Bearer "):
        assert ask(server, "GET", "/status", Authorization=f"{scheme} {presented['read']}")[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=WAIT_S)
    connection.putrequest("GET", "/status")
    connection.putheader("Authorization", f"Bearer {presented['read']}")
    connection.putheader("Authorization", f"Bearer {presented['admin']}")
    connection.endheaders()
    assert connection.getresponse().status == 401
    connection.close()


def test_a_stranger_is_answered_before_the_body_has_come(guarded: Guarded) -> None:
    server, _ = guarded
    with socket.create_connection(("127.0.0.1", server.http_port), WAIT_S) as connection:
        connection.sendall(b"POST /cache/clear HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")


def test_every_token_is_compared_in_constant_time_whichever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [Token(role, hashlib.sha256(role.name.encode()).digest()) for role in Role]
    compared: list[bytes] = []

    def compare(ours: bytes, theirs: bytes) -> bool:
        compared.append(ours)
        return hmac.compare_digest(ours, theirs)

    monkeypatch.setattr(access, "hmac", type("module", (), {"compare_digest": staticmethod(compare)}))
    for presented, role in ((b"READ", Role.READ), (b"ADMIN", Role.ADMIN), (b"nobody's", None), (b"", None)):
        compared.clear()
        assert access.role_of(known, presented) is role
        assert compared == [token.digest for token in known]


# --- health


def test_health_is_open_to_all_and_says_why_not_to_those_it_knows(tmp_path: Path) -> None:
    presented = make_tokens(tmp_path / "auth")
    with running(str(tmp_path), "--auth-file", str(tmp_path / "auth" / "server")) as server:
        assert ask(server, "GET", HEALTH)[::2] == (200, '{"status": "healthy"}')
        os.kill(server.process.pid, signal.SIGSTOP)
        eventually(lambda: ask(server, "GET", HEALTH)[0] == 503, "unhealthy")
        for token in (None, "nobody's"):
            assert json.loads(ask(server, "GET", HEALTH, token)[2]) == {"status": "unhealthy", "reason": None}
        assert "no answer" in json.loads(ask(server, "GET", HEALTH, presented["read"])[2])["reason"]
        os.kill(server.process.pid, signal.SIGCONT)
        eventually(server.healthy)


# --- secrets stay secret


def test_who_is_turned_away_is_counted_and_logged_seldom_and_no_secret_is_ever_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    presented = make_tokens(tmp_path / "auth")
    from_environment = "of-the-environment-" + "y" * 32
    monkeypatch.setenv("LMCACHE_WRITE_TOKEN", from_environment)
    monkeypatch.setenv("LMCACHE_LOG_LEVEL", "DEBUG")
    wrong = "almost-" + presented["admin"]
    with running(str(tmp_path), "--auth-file", str(tmp_path / "auth" / "server")) as server:
        assert ask(server, "POST", "/cache/clear", from_environment)[0] == 200
        answers = [ask(server, "GET", "/status", wrong) for _ in range(30)]
        answers += [ask(server, "POST", "/cache/clear", presented["read"]) for _ in range(5)]
        text = ask(server, "GET", "/metrics", presented["read"])[2]
        assert "lmcache_mp_http_refused_total 35.0" in text
        paths = ["/", "/status", "/config", "/version", "/openapi.json", "/docs", "/quota", "/nothing"]
        answers += [ask(server, "GET", path, presented["admin"]) for path in paths]
        service = server.service_pid()
        told = [Path(f"/proc/{pid}/cmdline").read_text() for pid in (server.process.pid, service)]
        told += [Path(f"/proc/{service}/environ").read_text(), text, repr(answers)]
        assert server.stop() == 0
    log = server.log()
    assert 1 <= log.count("turned away") <= 5
    secrets = [*presented.values(), from_environment, wrong]
    secrets += [hashlib.sha256(secret.encode()).hexdigest() for secret in secrets]
    assert not any(secret in text for secret in secrets for text in (*told, log))


# --- the file and the environment


def digest_line(role: str = "read", token: str = "a token") -> str:
    return f"{role} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"


def test_a_file_may_have_several_tokens_of_a_role_and_notes(tmp_path: Path) -> None:
    path = tmp_path / "auth"
    path.write_text(f"# ours\n\n  {digest_line('admin', 'old')}{digest_line('admin', 'new').strip()}  # since May\n")
    path.chmod(0o400)
    found = access.read_tokens(str(path), {})
    assert [access.role_of(found, token) for token in (b"old", b"new", b"other")] == [Role.ADMIN, Role.ADMIN, None]


@pytest.mark.parametrize("variable", ["LMCACHE_READ_TOKEN", "LMCACHE_WRITE_TOKEN", "LMCACHE_ADMIN_TOKEN"])
def test_the_environment_may_hold_a_token_which_is_taken_out_of_it(variable: str) -> None:
    environment = {variable: "z" * 40, "HOME": "/"}
    (token,) = access.read_tokens(None, environment)
    assert (access.variable(token.role), environment) == (variable, {"HOME": "/"})
    assert access.role_of([token], b"z" * 40) is token.role
    for bad in ("short", "z" * 40 + " z", "ü" * 40):
        with pytest.raises(ConfigError, match=variable) as raised:
            access.read_tokens(None, {variable: bad})
        assert bad not in str(raised.value)


def start(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to end by itself."""
    rpc_port, http_port = free_ports()
    defaults = [f"--port={rpc_port}", f"--http-port={http_port}", "--l1-size-gb=0.0625", f"--attach-path={tmp_path}/x"]
    command = [sys.executable, "-m", "lmcache.server", *defaults, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o610, 0o644, 0o660, 0o666])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "auth"
    path.write_text(digest_line())
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"can be used by others than its owner: chmod 600 {path}"):
        access.read_tokens(str(path), {})


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "holds no token"),
        ("# nothing\n", "holds no token"),
        ("root sha256:" + "0" * 64, "line 1: expected read, write or admin"),
        (digest_line() + "admin hunter2hunter2hunter2hunter2", "line 2: expected"),
        ("read sha256:" + "A" * 64, "line 1: expected"),
        ("read sha256:" + "0" * 63, "line 1: expected"),
        ("read md5:" + "0" * 64, "line 1: expected"),
        (digest_line() + digest_line("admin"), "a token is named twice"),
        ("".join(digest_line(token=str(number)) for number in range(65)), "at most 64 tokens, not 65"),
        ("#" * 70_000, "longer than 64 KiB"),
        ("# \xfc\n", "not ASCII"),
    ],
)
def test_a_file_that_is_no_list_of_tokens_is_refused_without_repeating_it(
    tmp_path: Path, content: str, sentence: str
) -> None:
    path = tmp_path / "auth"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=sentence) as raised:
        access.read_tokens(str(path), {})
    assert "hunter2" not in str(raised.value)
    assert "0000" not in str(raised.value)


def test_neither_a_folder_nor_a_pipe_nor_another_users_file_is_taken_for_tokens(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    for name, sentence in ((".", "is no plain file"), ("pipe", "is no plain file"), ("nothing", "cannot read")):
        with pytest.raises(ConfigError, match=sentence):
            access.read_tokens(str(tmp_path / name), {})
    (tmp_path / "theirs").write_text(digest_line())
    (tmp_path / "theirs").chmod(0o600)
    if os.geteuid() == 0:  # nobody else can make such a file
        os.chown(tmp_path / "theirs", 65534, 65534)
        with pytest.raises(ConfigError, match="belongs to another user"):
            access.read_tokens(str(tmp_path / "theirs"), {})


def test_a_server_whose_tokens_cannot_be_read_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "auth").write_text(digest_line())
    (tmp_path / "auth").chmod(0o644)
    ended = start(tmp_path, "--auth-file", f"{tmp_path}/auth")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert "chmod 600" in ended.stderr


# --- a server without tokens


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        ({"Host": "rebound.example:8080"}, "answers only to its address"),
        ({"Host": "[::bad"}, "answers only to its address"),
        ({"Origin": "http://evil.example"}, "no page of another site"),
        ({"Origin": "null"}, "no page of another site"),
        ({"Host": "localhost", "Origin": "http://localhost.evil.example"}, "no page of another site"),
        ({"X_Forwarded_For": "127.0.0.1"}, "no relayed requests"),
        ({"Forwarded": "for=127.0.0.1"}, "no relayed requests"),
        ({"Via": "1.1 proxy"}, "no relayed requests"),
    ],
)
def test_pages_of_other_sites_and_relays_do_not_speak_for_this_machine(
    shared: Server, headers: dict[str, str], sentence: str
) -> None:
    for method, path in (("GET", "/status"), ("POST", "/cache/clear"), ("OPTIONS", "/cache/clear")):
        status, _, text = ask(shared, method, path, **headers)
        assert (status, sentence in text, "lmcache auth init" in text) == (403, True, True)
    assert ask(shared, "GET", HEALTH, **headers)[0] == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1", "127.0.0.1:8080", "[::1]:8080", "lmcache", "a.localhost", socket.gethostname()]
)
def test_names_that_only_this_machine_can_have_are_answered(shared: Server, host: str) -> None:
    assert ask(shared, "GET", "/status", Host=host)[0] == 200
    assert ask(shared, "POST", "/cache/clear", Host=host, Origin=f"http://{host}")[0] == 200


def test_a_link_local_address_is_local_on_its_own_link_only() -> None:
    import psutil

    own = [item.address for items in psutil.net_if_addrs().values() for item in items if "%" in item.address]
    local = LocalAddresses()
    for address in own:
        assert address in local
        assert address.partition("%")[0] + "%elsewhere" not in local
        assert address.partition("%")[0] not in local
    assert "fe80::1%elsewhere" not in local
