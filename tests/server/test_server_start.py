"""How a server starts, and how it says that it cannot."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from server_running import WAIT_S, Server, free_ports, running

from lmcache.server.addresses import LocalAddresses


def start(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a server that is expected to end by itself."""
    rpc_port, http_port = free_ports()
    # later options win over earlier ones
    defaults = [f"--port={rpc_port}", f"--http-port={http_port}", "--l1-size-gb=0.0625", f"--attach-path={tmp_path}/x"]
    command = [sys.executable, "-m", "lmcache.server", *defaults, *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--eviction-policy", "MRU"], "unknown eviction policy 'MRU'; known: LRU"),
        (["--chunk-size", "0"], "--chunk-size is 1 to 65536 tokens, not 0"),
        (["--chunk-size", "65537"], "--chunk-size is 1 to 65536 tokens, not 65537"),
        (["--l1-size-gb", "-1"], "--l1-size-gb is"),
        (["--l1-size-gb", "nan"], "--l1-size-gb is"),
        (["--l1-size-gb", "900000"], "does not fit"),
        (["--port", "0"], "--port is 1 to 65535, not 0"),
        (["--host", "no such host"], "is no address of this machine"),
        (["--host", "192.0.2.1"], "cannot listen on"),
        (["--attach-group", "no such group"], "there is no group 'no such group'"),
        (["--attach-path", "/" + "x" * 200], "set a shorter --attach-path"),
    ],
)
def test_a_setting_that_cannot_work_gets_one_line_and_exit_2(tmp_path: Path, options: list[str], sentence: str) -> None:
    ended = start(tmp_path, *options)
    assert ended.returncode == 2, ended
    assert sentence in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert ended.stdout == ""


def test_a_size_that_does_not_fit_is_told_beside_what_is_free_and_the_limit(tmp_path: Path) -> None:
    line = start(tmp_path, "--l1-size-gb", "900000").stderr
    assert "900000 does not fit" in line
    assert "/dev/shm" in line
    assert "free" in line


def test_a_log_level_that_does_not_exist_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCACHE_LOG_LEVEL", "loud")
    ended = start(tmp_path)
    assert (ended.returncode, "LMCACHE_LOG_LEVEL" in ended.stderr) == (2, True)


@pytest.mark.parametrize("option", ["--port", "--http-port"])
def test_a_port_in_use_gets_one_line_and_exit_1(tmp_path: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = start(tmp_path, option, str(port))
    assert ended.returncode == 1
    assert ended.stderr == f"lmcache server: port {port} is in use on 127.0.0.1\n"
    assert not os.path.exists(f"/dev/shm/lmcache-{os.geteuid()}/{port}")


def test_a_second_server_takes_neither_port_nor_attach_path_nor_pool_of_the_first(
    shared: Server, tmp_path: Path
) -> None:
    _, other_port = free_ports()
    same_port = start(tmp_path, f"--port={shared.rpc_port}")
    same_path = start(tmp_path, f"--http-port={other_port}", "--attach-path", shared.attach_path)
    assert (same_port.returncode, same_path.returncode) == (1, 2)
    assert "is in use" in same_port.stderr
    assert "another server listens" in same_path.stderr
    assert shared.healthy()


def test_two_servers_of_one_user_live_side_by_side(shared: Server, tmp_path: Path) -> None:
    with running(str(tmp_path)) as other:
        assert other.healthy()
        assert shared.healthy()


def test_the_start_says_how_an_engine_uses_it(shared: Server) -> None:
    log = shared.log()
    assert f"RPC {shared.rpc}" in log
    assert "vllm serve MODEL --kv-transfer-config" in log
    assert f'"lmcache.mp.port":{shared.rpc_port}' in log


def test_all_interfaces_may_be_listened_on_and_local_engines_are_served(tmp_path: Path) -> None:
    from lmcache.wire import messages as m
    from lmcache.wire.client import Client

    with running(str(tmp_path), "--host", "0.0.0.0") as server, Client(server.rpc) as client:
        assert isinstance(client.call(m.Hello(0, version=m.WIRE_VERSION), WAIT_S), m.Welcome)


def test_addresses_of_this_machine_are_local_and_no_others() -> None:
    local = LocalAddresses()
    assert all(address in local for address in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"))
    assert all(address not in local for address in ("192.0.2.1", "2001:db8::1", "", "localhost:0:0:1"))


def test_the_server_loads_no_torch() -> None:
    program = (
        "import sys; import lmcache.server.assembly, lmcache.server.service; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=WAIT_S).returncode == 0
