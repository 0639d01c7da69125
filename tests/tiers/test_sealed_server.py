"""A sealed tier through a real server: keys come and go, and no server removes what another one has sealed."""

from __future__ import annotations

import hashlib
import json
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from lmcache.tiers.objects import decode
from lmcache.wire import messages as m

sys.path.append(str(Path(__file__).parents[1] / "server"))

from server_running import Engine, Server, eventually, running
from server_running import Engines as Attached
from test_server_tiers import adapter, forget_l1, objects, wait_objects, wait_up


@pytest.fixture
def engines() -> Iterator[Attached]:
    """Makes engines that are closed after the test."""
    with ExitStack() as stack:
        yield Attached(stack)


NAMES: list[object] = [f"sealed chunk {number}" for number in range(12)]
ONE, OTHER = secrets.token_hex(32), secrets.token_hex(32)


def sealed_with(folder: Path, *keys: str) -> list[str]:
    """Options of a server with a sealed tier; without keys, of one that is not sealed."""
    options: dict[str, object] = {"type": "file", "base_path": str(folder / "l2"), "capacity_gb": 0.25}
    if keys:
        path = folder / "keys"
        path.unlink(missing_ok=True)
        path.touch(0o600)
        path.write_text("\n".join(keys))
        options["seal"] = {"key_file": str(path)}
    return ["--l2-adapter", json.dumps(options)]


def promoted(engine: Engine) -> int:
    """Chunks that come back, each compared to the byte."""
    found = engine.promote(NAMES)
    assert all(engine.verified(found, NAMES[: found.num_chunks]))
    if found.num_chunks:
        engine.call(m.Release(0, lease=found.lease))
    return found.num_chunks


def forget_l1_when_written(server: Server) -> None:
    eventually(lambda: server.metric("unwritten_chunks") == 0, "nothing is on its way to the tier")
    forget_l1(server)


def num_spoiled(server: Server) -> float:
    """Objects that the cascade took for spoiled, and removed."""
    _, text = server.ask("/metrics")
    (line,) = [line for line in str(text).splitlines() if line.startswith("lmcache_mp_l2_spoiled_total{")]
    return float(line.split()[-1])


def key_ids(folder: Path) -> set[bytes]:
    """Of the keys that objects were sealed with."""
    seals = [decode(path.read_bytes()).seal for path in objects(folder)]
    return {seal.key_id for seal in seals if seal is not None}


def test_a_server_with_another_key_misses_and_removes_nothing_and_one_with_both_hits(
    tmp_path: Path, engines: Attached
) -> None:
    with running(str(tmp_path), *sealed_with(tmp_path, ONE)) as server:
        wait_up(server)
        engine = engines(server)
        assert engine.store(NAMES) == len(NAMES)
        wait_objects(server, len(NAMES))
        forget_l1_when_written(server)
        assert promoted(engine) == len(NAMES)
        assert "AES-256-GCM" in adapter(server)["backend"]
        forget_l1(server)  # else the next server would take over what is in L1
    before = {path.name: path.read_bytes() for path in objects(tmp_path)}
    assert len(before) == len(NAMES)

    with running(str(tmp_path), *sealed_with(tmp_path, OTHER)) as server:
        wait_up(server)
        wait_objects(server, len(NAMES))
        assert promoted(engines(server)) == 0
        assert adapter(server)["is_healthy"] is True
        assert "sealed with a key that is not configured" in adapter(server)["reason"]
        assert num_spoiled(server) == 0
    assert {path.name: path.read_bytes() for path in objects(tmp_path)} == before

    with running(str(tmp_path), *sealed_with(tmp_path, OTHER, ONE)) as server:
        wait_up(server)
        assert promoted(engines(server)) == len(NAMES)
        assert adapter(server)["reason"] is None


def test_what_was_computed_anew_takes_the_place_of_what_no_key_opens(tmp_path: Path, engines: Attached) -> None:
    for key in (ONE, OTHER):
        with running(str(tmp_path), *sealed_with(tmp_path, key)) as server:
            wait_up(server)
            engine = engines(server)
            assert promoted(engine) == 0
            assert engine.store(NAMES) == len(NAMES)
            wanted = hashlib.sha256(bytes.fromhex(key)).digest()[:4]
            eventually(lambda wanted=wanted: key_ids(tmp_path) == {wanted}, "all objects are sealed with this key")
            assert num_spoiled(server) == 0
            forget_l1_when_written(server)
            assert promoted(engine) == len(NAMES)
    assert len(objects(tmp_path)) == len(NAMES)
