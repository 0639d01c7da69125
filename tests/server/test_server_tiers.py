"""Tiers below L1, through a real server: what was stored outlives the server, and nothing wrong ever comes back."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from server_running import EXTENT_BYTES, Engine, Engines, Server, eventually, key, running

from lmcache.wire import messages as m

NAMES: list[object] = [f"chunk {number}" for number in range(24)]


def with_file(folder: Path, *options: str, gb: float = 0.25) -> list[str]:
    return ["--l2-path", str(folder / "l2"), "--l2-size-gb", str(gb), *options]


def objects(folder: Path) -> list[Path]:
    return [path for path in (folder / "l2").rglob("*") if path.is_file() and len(path.name) >= 64]


def is_written(server: Server, num: int) -> Any:
    return eventually(
        lambda: server.metric("unwritten_chunks") == 0 and server.status()["storage_manager"]["l2_adapters"],
        f"{num} chunks are written",
    )


def adapter(server: Server) -> dict[str, Any]:
    (found,) = server.status()["storage_manager"]["l2_adapters"]
    assert isinstance(found, dict)
    return found


def wait_up(server: Server) -> None:
    eventually(lambda: adapter(server)["is_healthy"], "the tier is in use")


def wait_objects(server: Server, num: int) -> None:
    eventually(lambda: adapter(server)["stored_object_count"] == num, f"{num} objects are in the tier")


@pytest.fixture
def tiered(tmp_path: Path) -> Iterator[Server]:
    with running(str(tmp_path), *with_file(tmp_path)) as server:
        wait_up(server)
        yield server


def forget_l1(server: Server) -> None:
    code, reply = server.ask("/cache/clear", b"")
    assert code == 200, reply
    assert reply["cleared"]["num_kept"] == 0


def test_what_l1_has_forgotten_comes_back_byte_for_byte_and_stays(tiered: Server, engines: Engines) -> None:
    engine = engines(tiered)
    assert engine.store(NAMES) == len(NAMES)
    wait_objects(tiered, len(NAMES))
    forget_l1(tiered)
    assert engine.lookup(NAMES).num_chunks == 0
    found = engine.promote(NAMES)
    assert found.num_chunks == len(NAMES)
    assert all(engine.verified(found, NAMES))
    engine.call(m.Release(0, lease=found.lease))
    assert engine.lookup(NAMES).num_chunks == len(NAMES)
    assert tiered.metric("unwritten_chunks") == 0


def test_a_chunk_of_many_ranks_comes_back_whole(tiered: Server, engines: Engines) -> None:
    ranks = [engines(tiered, rank=rank, world_size=3) for rank in range(3)]
    for engine in ranks:
        assert engine.store(NAMES[:4]) == 4
    wait_objects(tiered, 4)
    forget_l1(tiered)
    found = ranks[0].promote(NAMES[:4])
    assert found.num_chunks == 4
    offsets = memoryview(found.offsets).cast("Q").tolist()
    checksums = memoryview(found.checksums).cast("Q").tolist()
    for rank, engine in enumerate(ranks):
        for chunk, name in enumerate(NAMES[:4]):
            at = chunk * 3 + rank
            data = engine.pool[offsets[at] : offsets[at] + EXTENT_BYTES]
            assert engine.checksum(name, data) == checksums[at]


def test_a_prompt_of_which_the_tier_has_the_middle_only_is_no_hit(tiered: Server, engines: Engines) -> None:
    engine = engines(tiered)
    engine.store(NAMES[1:4])
    wait_objects(tiered, 3)
    forget_l1(tiered)
    assert engine.promote(NAMES[:4]).num_chunks == 0


def test_what_was_written_survives_a_killed_server_and_a_clean_stop(tmp_path: Path) -> None:
    with ExitStack() as stack:
        make = Engines(stack)
        server = stack.enter_context(running(str(tmp_path), *with_file(tmp_path)))
        wait_up(server)
        make(server).store(NAMES)
        wait_objects(server, len(NAMES))
        server.kill()
        for name in ("pool", "records"):  # as after a reboot
            os.unlink(f"{server.pool_folder}/{name}")
        server.start()
        wait_up(server)
        engine = make(server)
        found = engine.promote(NAMES)
        assert found.num_chunks == len(NAMES)
        assert all(engine.verified(found, NAMES))
        more: list[object] = [f"last {number}" for number in range(100)]
        assert engine.store(more) == 100
        assert server.stop() == 0  # writes down what only L1 has
        server.start()
        wait_up(server)
        again = make(server)
        assert again.promote(more).num_chunks == 100


@pytest.mark.parametrize("damage", ["flip", "truncate", "lengthen", "swap", "empty"])
def test_a_damaged_object_is_a_miss_and_is_repaired_by_the_next_store(
    tiered: Server, engines: Engines, tmp_path: Path, damage: str
) -> None:
    engine = engines(tiered)
    engine.store(NAMES[:2])
    wait_objects(tiered, 2)
    forget_l1(tiered)
    one, two = sorted(objects(tmp_path))
    data = bytearray(one.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
    elif damage == "truncate":
        del data[-4096:]
    elif damage == "lengthen":
        data += bytes(4096)
    elif damage == "empty":
        data.clear()
    if damage == "swap":
        other = two.read_bytes()
        two.write_bytes(data)
        data = bytearray(other)
    one.write_bytes(data)
    found = engine.promote(NAMES[:2])
    assert found.num_chunks < 2
    assert all(engine.verified(found, NAMES[:2]))
    if found.lease:
        engine.call(m.Release(0, lease=found.lease))
    engine.store(NAMES[:2])
    wait_objects(tiered, 2)
    eventually(lambda: tiered.metric("unwritten_chunks") == 0)
    forget_l1(tiered)
    found = engine.promote(NAMES[:2])
    assert found.num_chunks == 2
    assert all(engine.verified(found, NAMES[:2]))


def test_the_bytes_an_engine_found_wrong_leave_the_tier_too(tiered: Server, engines: Engines) -> None:
    engine = engines(tiered)
    engine.store(NAMES[:3])
    wait_objects(tiered, 3)
    found = engine.lookup(NAMES[:3])
    engine.call(m.Release(0, lease=found.lease, failed=(1).to_bytes(4, "little")))
    wait_objects(tiered, 2)
    assert engine.promote(NAMES[:3]).num_chunks == 1


def test_a_promotion_that_is_given_up_leaves_nothing_behind(tiered: Server, engines: Engines) -> None:
    engine = engines(tiered)
    engine.store(NAMES)
    wait_objects(tiered, len(NAMES))
    forget_l1(tiered)
    asked = engine.client.call(m.Lookup(0, keys=b"".join(map(key, NAMES)), promote=True), 30)
    assert isinstance(asked, m.Promoting)
    engine.call(m.Release(0, lease=asked.promotion))
    eventually(lambda: tiered.l1()["write_locked_count"] == 0)
    assert engine.promote(NAMES).num_chunks == len(NAMES)


def test_a_dead_cascade_is_replaced_and_costs_no_chunk_of_l1(tiered: Server, engines: Engines) -> None:
    engine = engines(tiered)
    engine.store(NAMES[:10])
    pid = tiered.service_pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    assert engine.store(NAMES[10:]) == len(NAMES) - 10
    found = engine.promote([*NAMES, "absent"])
    assert found.num_chunks == len(NAMES)
    engine.call(m.Release(0, lease=found.lease))
    eventually(lambda: tiered.service_pid() not in (None, pid))
    eventually(tiered.healthy)
    wait_objects(tiered, len(NAMES))


def test_a_stopped_cascade_makes_nobody_wait_longer_than_its_patience(tiered: Server, engines: Engines) -> None:
    engine = engines(tiered)
    pid = tiered.service_pid()
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        assert engine.store(NAMES) == len(NAMES)
        assert engine.promote(NAMES).num_chunks == len(NAMES)  # all in L1: no tier is asked
        request = m.Lookup(0, keys=b"".join(map(key, ["absent"])), promote=True)
        assert isinstance(engine.call(request), m.Promoting)
        assert isinstance(engine.call(m.Lookup(0, keys=key("absent"))), m.Found)
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_objects(tiered, len(NAMES))


def test_a_folder_that_is_deleted_costs_misses_and_is_made_again(
    tiered: Server, engines: Engines, tmp_path: Path
) -> None:
    engine = engines(tiered)
    engine.store(NAMES[:5])
    wait_objects(tiered, 5)
    forget_l1(tiered)
    shutil.rmtree(tmp_path / "l2")
    assert engine.promote(NAMES[:5]).num_chunks == 0
    engine.store(NAMES[:5])
    eventually(lambda: len(objects(tmp_path)) == 5)
    forget_l1(tiered)
    assert engine.promote(NAMES[:5]).num_chunks == 5


def test_read_only_writes_nothing_and_reads_what_is_there(tmp_path: Path) -> None:
    with ExitStack() as stack:
        make = Engines(stack)
        server = stack.enter_context(running(str(tmp_path), *with_file(tmp_path)))
        wait_up(server)
        make(server).store(NAMES[:4])
        wait_objects(server, 4)
        server.stop()
        reader = stack.enter_context(running(str(tmp_path), *with_file(tmp_path, "--l2-write-policy", "read-only")))
        wait_up(reader)
        engine = make(reader)
        assert engine.promote(NAMES[:4]).num_chunks == 4
        engine.store(NAMES[4:8])
        time.sleep(0.3)
        assert len(objects(tmp_path)) == 4


def test_write_back_writes_when_l1_needs_the_room(tmp_path: Path) -> None:
    options = with_file(tmp_path, "--l2-write-policy", "write-back")
    with running(str(tmp_path), *options) as server, ExitStack() as stack:
        wait_up(server)
        engine: Engine = Engines(stack)(server)
        few: list[object] = [f"few {number}" for number in range(10)]
        engine.store(few)
        time.sleep(0.3)
        assert len(objects(tmp_path)) == 0
        capacity = server.l1()["memory_total_bytes"] // EXTENT_BYTES
        many: list[object] = [f"many {number}" for number in range(capacity - 20)]
        for start in range(0, len(many), 100):
            assert engine.store(many[start : start + 100]) == len(many[start : start + 100])
        eventually(lambda: len(objects(tmp_path)) >= 10, "the oldest are written")
