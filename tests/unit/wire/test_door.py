"""The server's side of attaching, one verb at a time: folders, stale sockets, groups, a lack of descriptors."""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache.errors import ConfigError, WireError
from lmcache.wire import framing, unix_listener
from lmcache.wire import messages as m
from lmcache.wire.door import SPEAK_S, Door, Visitor, default_path
from lmcache.wire.unix_listener import prepare_folder

ASK = m.Attach(version=m.WIRE_VERSION, pid=1, name="test", want_pool=False)
NO = m.AttachRefused(code="busy", message="not now")


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    opened = Door(str(tmp_path / "sock"))
    yield opened
    opened.close()


def knock(door: Door) -> tuple[socket.socket, Visitor]:
    """A connection, and what the server sees of it; both are closed by the test."""
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.connect(door.path)
    visitor = door.accept(100.0)
    assert visitor is not None
    return ours, visitor


def test_a_visitor_is_known_by_the_kernels_word_and_has_its_time_to_speak(door: Door) -> None:
    ours, visitor = knock(door)
    assert (visitor.pid, visitor.uid, visitor.may_enter) == (os.getpid(), os.geteuid(), True)
    assert visitor.deadline == 100.0 + SPEAK_S
    assert door.accept(0.0) is None  # nobody else waits
    assert door.fileno() >= 0
    visitor.close()
    ours.close()


def test_what_a_visitor_asks_for_may_come_in_parts(door: Door) -> None:
    ours, visitor = knock(door)
    frame = framing.pack(ASK)
    assert visitor.read() is None
    ours.sendall(frame[:3])
    assert visitor.read() is None
    ours.sendall(frame[3:])
    assert visitor.read() == ASK
    visitor.close()
    ours.close()


def test_a_visitor_that_leaves_without_a_word_or_resets_is_gone(door: Door) -> None:
    ours, visitor = knock(door)
    ours.close()
    with pytest.raises(EOFError):
        visitor.read()
    visitor.close()
    with pytest.raises(EOFError):
        visitor.read()  # its descriptor is bad by now: any error of the socket means the same


def test_a_visitor_that_says_more_than_its_frame_is_not_understood(door: Door) -> None:
    ours, visitor = knock(door)
    ours.sendall(framing.pack(ASK) + b"more")
    with pytest.raises(WireError):
        visitor.read()
    visitor.close()
    ours.close()


def test_an_attached_process_is_gone_when_it_closes_or_speaks_and_not_before(door: Door) -> None:
    ours, visitor = knock(door)
    assert not visitor.gone()
    ours.sendall(b"x")
    assert visitor.gone()
    ours.close()
    assert visitor.gone()
    visitor.close()
    assert visitor.gone()


def test_an_answer_arrives_with_or_without_a_descriptor_and_fails_quietly_when_nobody_is_there(door: Door) -> None:
    ours, visitor = knock(door)
    assert visitor.answer(NO)
    assert ours.recv(4096) == framing.pack(NO)
    given = os.open(os.devnull, os.O_RDONLY)
    assert visitor.answer(NO, given)
    data, fds, _, _ = socket.recv_fds(ours, 4096, 1)
    assert data == framing.pack(NO)
    assert os.path.sameopenfile(fds[0], given)
    for fd in (given, *fds):
        os.close(fd)
    ours.close()
    assert not visitor.answer(NO)
    visitor.close()


def test_only_the_owner_may_use_the_socket_unless_a_group_is_named(tmp_path: Path) -> None:
    for gid, mode in ((None, 0o600), (os.getegid(), 0o660)):
        opened = Door(str(tmp_path / f"{gid}"), gid)
        assert stat.S_IMODE(os.stat(opened.path).st_mode) == mode
        opened.close()
        assert not os.path.exists(opened.path)


def test_a_member_of_the_group_may_enter_by_its_own_or_a_further_group(tmp_path: Path) -> None:
    opened = Door(str(tmp_path / "sock"), os.getegid())
    ours, visitor = knock(opened)
    assert opened._in_group(visitor.socket, os.getegid())  # its own group
    assert opened._in_group(visitor.socket, 1 << 20) == (os.getegid() in os.getgroups())  # one of the further ones
    visitor.close()
    assert not opened._in_group(visitor.socket, 1 << 20)  # gone before it could be asked
    ours.close()
    opened.close()


def test_without_a_group_no_group_helps(door: Door) -> None:
    ours, visitor = knock(door)
    assert not door._in_group(visitor.socket, os.getegid())
    visitor.close()
    ours.close()


def test_a_server_out_of_descriptors_hangs_up_on_who_comes_and_goes_on(door: Door) -> None:
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.connect(door.path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)  # the lowest number that is free
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        assert door.accept(0.0) is None
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert ours.recv(1) == b""  # told at once, instead of waiting for ever
    ours.close()
    ours, visitor = knock(door)
    visitor.close()
    ours.close()


def test_a_socket_nobody_listens_at_is_replaced_and_one_that_lives_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(path)
    living = Door(path)
    with pytest.raises(ConfigError, match="another server listens"):
        Door(path)
    living.close()


def test_a_path_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket"):
        Door(str(path))
    assert path.read_text() == "precious"


def test_a_socket_of_another_kind_is_not_taken_for_a_dead_one(tmp_path: Path) -> None:
    path = str(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(path)
        with pytest.raises(ConfigError, match="cannot tell who listens"):
            Door(path)
    assert os.path.exists(path)


def test_a_socket_that_cannot_be_made_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(unix_listener, "share", refuse)
    with pytest.raises(ConfigError, match="cannot make the socket"):
        Door(str(tmp_path / "sock"))


def test_folders_that_others_could_have_prepared_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="writable by others"):
        prepare_folder(str(folder / "sock"), None)
    folder.chmod(0o1777)  # as /tmp is: nobody can replace what is another's
    prepare_folder(str(folder / "sock"), None)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(ConfigError, match="a link or no folder"):
        prepare_folder(str(link / "sock"), None)
    with pytest.raises(ConfigError, match="longer than"):
        prepare_folder(str(tmp_path / ("x" * 120) / "sock"), None)
    with pytest.raises(ConfigError, match="cannot make the folder"):
        prepare_folder(str(tmp_path / "missing" / "deeper" / "sock"), None)


def test_a_folder_for_a_group_can_be_entered_by_it_and_read_by_nobody_else(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    prepare_folder(str(folder / "sock"), os.getegid())
    found = folder.stat()
    assert (stat.S_IMODE(found.st_mode), found.st_gid) == (0o710, os.getegid())
    prepare_folder(str(folder / "sock"), os.getegid())  # it is there already, and fine


def test_the_default_path_has_a_folder_of_its_own_for_a_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_path(5555, None) == f"{tmp_path}/lmcache/5555.sock"
    assert default_path(5555, 7) == f"/tmp/lmcache-{os.geteuid()}-7/5555.sock"
