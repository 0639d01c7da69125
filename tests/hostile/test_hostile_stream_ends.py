"""How a conversation by path begins and ends: whose socket it is, what is left of a killed server, last words."""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from framed import Caller, framed, stopped
from server_running import WAIT_S, Engine, Engines, Server, eventually, running
from witness import watched

from lmcache.errors import PeerSilent
from lmcache.wire import codec
from lmcache.wire import messages as m

PING = framed(codec.encode(m.Ping(7)))
AS_NOBODY = """
import os, socket, sys
os.setgroups([int(word) for word in sys.argv[2:]])
os.setgid(65534)
os.setuid(65534)
with socket.socket(socket.AF_UNIX) as connection:
    try:
        connection.connect(sys.argv[1])
    except PermissionError:
        sys.exit(3)
"""


def as_nobody(path: str, *groups: int) -> int:
    """The exit status of another user who tries to connect: 0 let in, 3 not."""
    command = [sys.executable, "-c", AS_NOBODY, path, *map(str, groups)]
    return subprocess.run(command, timeout=WAIT_S, check=False).returncode


def test_the_socket_is_its_owners_only(own: Server) -> None:
    found = os.stat(own.local_path)
    assert stat.S_ISSOCK(found.st_mode)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_uid == os.geteuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_connects_only_as_a_member_of_the_attach_group() -> None:
    group = next(item for item in grp.getgrall() if item.gr_gid not in (0, 65534))
    for options, statuses in (((), (3, 3)), (("--attach-group", group.gr_name), (3, 0))):
        with tempfile.TemporaryDirectory(prefix="lmcache-test-") as folder:
            os.chmod(folder, 0o755)  # the folder keeps nobody out: the socket must
            with running(folder, *options) as server:
                assert (as_nobody(server.local_path), as_nobody(server.local_path, group.gr_gid)) == statuses
                found = os.stat(server.local_path)
                if options:
                    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o660, group.gr_gid)


def test_the_socket_of_a_killed_server_is_replaced_and_the_line_to_it_is_over_for_good(
    own: Server, engines: Engines
) -> None:
    engine = engines(own)
    own.kill()
    before = os.stat(own.local_path)
    with pytest.raises(PeerSilent, match="ended the conversation"):
        engine.call(m.Ping(0))
    with pytest.raises(ConnectionRefusedError):
        Caller(own.local_path)
    own.start()
    assert os.stat(own.local_path).st_ctime_ns != before.st_ctime_ns
    assert stat.S_IMODE(os.stat(own.local_path).st_mode) == 0o600
    with pytest.raises(PeerSilent, match="ended the conversation"):
        engine.call(m.Ping(0))
    assert engines(own).store(["anew"]) == 1
    assert own.stop() == 0
    assert not os.path.exists(own.local_path)


@pytest.mark.parametrize("kind", ["file", "link", "listener"])
def test_what_is_not_a_dead_servers_socket_is_left_alone_and_named(tmp_path: Path, kind: str) -> None:
    with contextlib.ExitStack() as stack:
        server = Server(str(tmp_path))
        target = tmp_path / "target"
        if kind == "file":
            Path(server.local_path).write_text("precious")
        elif kind == "link":
            target.write_text("precious")
            os.symlink(target, server.local_path)
        else:
            other = stack.enter_context(running(str(tmp_path)))
            os.link(other.local_path, server.local_path)
        command = [sys.executable, "-m", "lmcache.server", *server.options]
        environment = {**os.environ, "XDG_STATE_HOME": f"{tmp_path}/state"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False, env=environment)
        assert done.returncode == 2
        assert server.local_path in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert os.path.lexists(server.local_path)
        assert not os.path.exists(server.attach_path)
        if kind != "listener":
            assert Path(server.local_path).read_text() == "precious"
        else:
            assert other.healthy()


def close_requests_first(engine: Engine) -> None:
    engine.client.close()
    engine.attachment.close()


def close_attachment_first(engine: Engine) -> None:
    engine.attachment.close()
    engine.client.close()


ENDS = [close_requests_first, close_attachment_first]


def says_and_leaves(server: Server, names: list[object], before: bytes, end: Callable[[Engine], None]) -> None:
    """Commit a chunk, behind ``before`` on the wire, and be gone."""
    engine = Engine(server)
    granted = engine.reserve(names)
    commit = m.Commit(9, ticket=granted.ticket, checksums=engine.write(granted, names))
    with Caller(server.local_path) as caller:
        caller.ask(m.Hello(1, version=m.WIRE_VERSION, token=engine.attachment.reply.token))
        caller.send(before + framed(codec.encode(commit)))
        if end is close_requests_first:
            caller.close()
        end(engine)
    engine.close()


@pytest.mark.parametrize("before", [b"", PING, PING * 900], ids=["at once", "after a ping", "after many"])
@pytest.mark.parametrize("end", ENDS)
def test_what_a_process_said_just_before_its_end_is_heard(
    besieged: Server, engines: Engines, before: bytes, end: Callable[[Engine], None]
) -> None:
    names = [[("last words", os.urandom(8))] for _ in range(30)]
    for name in names:
        says_and_leaves(besieged, list(name), before, end)
    eventually(lambda: besieged.status()["attached_processes"] == 0, "all are gone")
    reader = engines(besieged)
    assert [reader.lookup(list(name), lease=False).num_chunks for name in names] == [1] * len(names)


@pytest.mark.parametrize("end", ENDS)
def test_last_words_are_heard_though_hundreds_of_others_wait_before_them(
    besieged: Server, engines: Engines, end: Callable[[Engine], None]
) -> None:
    names: list[object] = [("last words in a crowd", os.urandom(8))]
    engine = Engine(besieged)
    granted = engine.reserve(names)
    checksums = engine.write(granted, names)
    with watched(besieged), contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(Caller(besieged.local_path)) for _ in range(300)]
        with stopped(besieged):
            for caller in crowd:
                caller.send(PING * 50)
            engine.client.send(m.Commit(0, ticket=granted.ticket, checksums=checksums))
            end(engine)
        eventually(lambda: besieged.status()["attached_processes"] == 1, "only the witness is attached")
    engine.close()
    assert engines(besieged).lookup(names, lease=False).num_chunks == 1


WORKER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from server_running import Engine
from lmcache.wire import messages as m
names = [("killed", os.getpid())]
engine = Engine(SimpleNamespace(attach_path=sys.argv[2]))
granted = engine.reserve(names)
checksums = engine.write(granted, names)
engine.client.send(m.Commit(0, ticket=granted.ticket, checksums=checksums))
os.kill(os.getpid(), int(sys.argv[3]))
"""


def test_what_a_killed_process_said_last_is_heard(besieged: Server, engines: Engines) -> None:
    here = str(Path(__file__).parents[1] / "server")
    reader = engines(besieged)
    for _ in range(5):
        command = [sys.executable, "-c", WORKER, here, besieged.attach_path, str(int(signal.SIGKILL))]
        with subprocess.Popen(command) as process:
            assert process.wait(WAIT_S) == -signal.SIGKILL
        eventually(lambda: besieged.status()["attached_processes"] == 1, "it is gone")
        assert reader.lookup([("killed", process.pid)], lease=False).num_chunks == 1
