"""Bytes that are not what was stored: `/status` names the chunk, `describe` shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_running import Engines, Server, eventually, key, running

from lmcache.cache.quarantine import NAMED_MAX
from lmcache.wire import messages as m

HANG_S = 60
NAMES: list[object] = [f"chunk {number}" for number in range(4)]


def spoil(engine: Any, names: list[object], *failed: int) -> None:
    """Look chunks up, and complain of these."""
    found = engine.lookup(names)
    assert found.num_chunks == len(names)
    engine.call(m.Release(0, lease=found.lease, failed=b"".join(index.to_bytes(4, "little") for index in failed)))


def describe(server: Server, *words: str) -> str:
    url = f"http://127.0.0.1:{server.http_port}"
    command = [sys.executable, "-m", "lmcache_cli", "describe", "kvcache", "--url", url, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_S).stdout


def test_a_chunk_that_an_engine_found_wrong_is_named(own: Server, engines: Engines) -> None:
    engine = engines(own)
    engine.store(NAMES)
    assert own.status()["quarantined"] == []
    assert "Quarantined" not in describe(own)
    assert "quarantined" not in describe(own, "--format", "json")
    spoil(engine, NAMES, 2)
    status = own.status()
    (named,) = status["quarantined"]
    age_s = named.pop("age_s")
    assert status["quarantined_count"] == 1
    assert named == {
        "key": key(NAMES[2]).hex()[:16],
        "namespace": "0" * 16,
        "rank": 0,
        "found_at": "use",
        "tier": "l1",
    }
    assert 0 <= age_s < HANG_S
    (shown,) = json.loads(describe(own, "--format", "json"))["metrics"]["quarantined"]
    assert shown.pop("age_s") >= age_s
    assert shown == named
    row = next(line for line in describe(own).splitlines() if line.startswith(named["key"]))
    assert "l1, at use, rank 0, " in row


def test_only_the_last_ones_are_named_and_all_are_counted(own: Server, engines: Engines) -> None:
    engine = engines(own)
    names: list[object] = [f"many {number}" for number in range(NAMED_MAX + 8)]
    for name in names:
        engine.store([name])
        spoil(engine, [name], 0)
    status = own.status()
    assert status["quarantined_count"] == len(names)
    newest_first = [key(name).hex()[:16] for name in reversed(names)]
    assert [named["key"] for named in status["quarantined"]] == newest_first[:NAMED_MAX]


@pytest.mark.parametrize("damage", ["flip", "header"])
def test_an_object_that_a_tier_gave_back_wrong_is_named_beside_them(
    tmp_path: Path, engines: Engines, damage: str
) -> None:
    with running(str(tmp_path), "--l2-path", str(tmp_path / "l2"), "--l2-size-gb", "0.25") as server:
        eventually(lambda: server.status()["storage_manager"]["l2_adapters"][0]["is_healthy"], "the tier is in use")
        engine = engines(server)
        engine.store(NAMES)
        spoil(engine, NAMES, 3)
        engine.store(NAMES[:1])
        eventually(lambda: server.metric("unwritten_chunks") == 0, "all is written")
        eventually(lambda: server.ask("/cache/clear", b"{}")[1]["cleared"]["num_kept"] == 0, "L1 has forgotten")
        (path,) = [path for path in (tmp_path / "l2").rglob("*") if path.name.startswith(key(NAMES[0]).hex())]
        data = bytearray(path.read_bytes())
        data[len(data) // 2 if damage == "flip" else 0] ^= 4
        path.write_bytes(data)
        assert engine.promote(NAMES[:1]).num_chunks == 0
        status = server.status()
        found, used = status["quarantined"]
        (adapter,) = status["storage_manager"]["l2_adapters"]
        assert found.pop("age_s") <= used.pop("age_s")
        assert found == {
            "key": key(NAMES[0]).hex()[:16],
            "namespace": "0" * 16 if damage == "flip" else None,
            "rank": 0 if damage == "flip" else None,
            "found_at": "promotion",
            "tier": adapter["name"],
        }
        assert (used["key"], used["found_at"]) == (key(NAMES[3]).hex()[:16], "use")
        assert f"{adapter['name']}, at promotion" in describe(server)
