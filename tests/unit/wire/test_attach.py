"""The attach socket: who gets in, what they are told, and what dies with whom."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmcache.errors import AttachError, ConfigError, WireError
from lmcache.wire import framing
from lmcache.wire import messages as m
from lmcache.wire.attach import attach
from lmcache.wire.door import Door, Visitor, default_path

WAIT_S = 10.0
ASK = m.Attach(version=m.WIRE_VERSION, pid=1, name="test", want_pool=True)
GIVEN = m.Attached(
    server=b"s" * 16,
    instance=3,
    token=b"t" * 16,
    endpoint="unix:///x",
    pool_bytes=8,
    ready_bytes=8,
    chunk_tokens=256,
    tenant_secret=b"k" * 32,
)


def next_visitor(door: Door) -> Visitor:
    door._listener._socket.settimeout(WAIT_S)
    visitor = door.accept(time.monotonic())
    assert visitor is not None
    return visitor


def heard(visitor: Visitor) -> m.Attach:
    visitor.socket.settimeout(WAIT_S)
    request = None
    while request is None:
        request = visitor.read()
    visitor.socket.setblocking(False)
    return request


def hang_up(visitor: Visitor) -> None:
    heard(visitor)
    visitor.close()


@contextmanager
def served(path: str, serve: Callable[[Visitor], None]) -> Iterator[list[Visitor]]:
    door = Door(path)
    visitors: list[Visitor] = []

    def run() -> None:
        visitors.append(next_visitor(door))
        serve(visitors[0])

    thread = threading.Thread(target=run)
    thread.start()
    yield visitors
    thread.join()
    visitors[0].close()
    door.close()


def test_an_attach_hands_out_the_pool_and_sees_who_asks(tmp_path: Path) -> None:
    seen: list[tuple[int, int, bool, m.Attach]] = []

    def serve(visitor: Visitor) -> None:
        seen.append((visitor.pid, visitor.uid, visitor.may_enter, heard(visitor)))
        pool = os.memfd_create("pool")
        os.write(pool, b"contents")
        assert visitor.answer(GIVEN, pool)
        os.close(pool)

    with served(f"{tmp_path}/x.sock", serve):
        attachment = attach(f"{tmp_path}/x.sock", ASK, WAIT_S)
    assert attachment.pool_fd is not None
    assert os.pread(attachment.pool_fd, 8, 0) == b"contents"
    assert not os.get_inheritable(attachment.pool_fd)
    assert attachment.reply == GIVEN
    assert seen == [(os.getpid(), os.geteuid(), True, ASK)]
    attachment.close()


def test_both_sides_notice_the_others_end(tmp_path: Path) -> None:
    def serve(visitor: Visitor) -> None:
        heard(visitor)
        visitor.answer(GIVEN)

    ask = m.Attach(version=m.WIRE_VERSION, pid=1, name="test", want_pool=False)
    with served(f"{tmp_path}/x.sock", serve) as visitors:
        first = attach(f"{tmp_path}/x.sock", ask, WAIT_S)
        assert first.alive()
        assert not visitors[0].gone()
        first.close()
        assert visitors[0].gone()
    with served(f"{tmp_path}/x.sock", serve) as visitors:
        second = attach(f"{tmp_path}/x.sock", ask, WAIT_S)
        visitors[0].close()
        assert not second.alive()
        second.close()


def test_a_refusal_is_raised_with_its_sentence(tmp_path: Path) -> None:
    def serve(visitor: Visitor) -> None:
        heard(visitor)
        visitor.answer(m.AttachRefused(code=m.REFUSED_VERSION, message="speak version 9"))
        visitor.close()

    with served(f"{tmp_path}/x.sock", serve), pytest.raises(AttachError, match="speak version 9"):
        attach(f"{tmp_path}/x.sock", ASK, WAIT_S)


def test_a_pool_that_was_promised_and_did_not_come_is_an_error(tmp_path: Path) -> None:
    def serve(visitor: Visitor) -> None:
        heard(visitor)
        visitor.answer(GIVEN)

    with served(f"{tmp_path}/x.sock", serve), pytest.raises(AttachError, match="no pool"):
        attach(f"{tmp_path}/x.sock", ASK, WAIT_S)


def test_silence_hanging_up_and_garbage_each_have_a_sentence(tmp_path: Path) -> None:
    path = f"{tmp_path}/x.sock"
    cases: list[tuple[Callable[[Visitor], object], str]] = [
        (lambda visitor: visitor.socket.send((5000).to_bytes(4, "little")), "at most"),
        (lambda visitor: visitor.socket.send(b"\1\0\0\0x"), "not an attach message"),
        (hang_up, "without an answer"),
    ]
    for act, sentence in cases:
        with served(path, lambda visitor, act=act: act(visitor)), pytest.raises(AttachError, match=sentence):  # type: ignore[misc]
            attach(path, ASK, WAIT_S)
    door = Door(path)
    with pytest.raises(AttachError, match="did not answer within"):
        attach(path, ASK, 0.05)
    door.close()


def test_a_missing_and_an_orphaned_socket_each_have_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(AttachError, match="no server has its attach socket"):
        attach(f"{tmp_path}/none.sock", ASK, WAIT_S)
    orphan = socket.socket(socket.AF_UNIX)
    orphan.bind(f"{tmp_path}/orphan.sock")
    orphan.close()
    with pytest.raises(AttachError, match="nobody listens"):
        attach(f"{tmp_path}/orphan.sock", ASK, WAIT_S)


def test_an_orphaned_socket_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    orphan = socket.socket(socket.AF_UNIX)
    orphan.bind(f"{tmp_path}/x.sock")
    orphan.close()
    door = Door(f"{tmp_path}/x.sock")
    with pytest.raises(ConfigError, match="another server listens"):
        Door(f"{tmp_path}/x.sock")
    door.close()
    assert os.listdir(tmp_path) == []


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.sock").write_text("mine")
    with pytest.raises(ConfigError, match="is no socket"):
        Door(f"{tmp_path}/x.sock")
    assert (tmp_path / "x.sock").read_text() == "mine"


def test_a_folder_that_others_may_have_prepared_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for folder in ("link", "open"):
        with pytest.raises(ConfigError):
            Door(f"{tmp_path}/{folder}/x.sock")


def test_the_socket_and_a_folder_made_for_it_are_for_their_owner_only(tmp_path: Path) -> None:
    door = Door(f"{tmp_path}/new/x.sock")
    modes = [os.lstat(path).st_mode & 0o777 for path in (f"{tmp_path}/new", f"{tmp_path}/new/x.sock")]
    door.close()
    assert modes == [0o700, 0o600]


def test_the_default_path_is_in_the_runtime_folder_but_not_for_a_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_path(5555, None) == f"{tmp_path}/lmcache/5555.sock"
    assert default_path(5555, 7) == f"/tmp/lmcache-{os.geteuid()}-7/5555.sock"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_path(5555, None) == f"/tmp/lmcache-{os.geteuid()}/5555.sock"


def test_more_than_one_frame_is_no_attach() -> None:
    import msgspec

    with pytest.raises(WireError, match="more than one"):
        framing.unpack(framing.pack(ASK) + b"x", msgspec.msgpack.Decoder(m.Attach))
