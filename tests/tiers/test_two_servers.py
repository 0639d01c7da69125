"""Two servers, one store: what an engine on the first has computed, an engine on the second finds."""

from __future__ import annotations

import importlib
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "server"))

from server_running import Engines, Server, eventually, running

SHARED = ("redis", "redis_cluster", "valkey", "object", "mooncake")
NAMES: list[object] = [f"chunk {number}" for number in range(12)]


def tier(server: Server) -> dict[str, Any]:
    (found,) = server.status()["storage_manager"]["l2_adapters"]
    assert isinstance(found, dict)
    return found


def puts(server: Server) -> float:
    lines = [line for line in server.ask("/metrics")[1].splitlines() if line.startswith("lmcache_mp_l2_puts_total")]
    return float(lines[0].split()[1])


@pytest.mark.parametrize("store", SHARED)
def test_an_engine_on_the_second_server_hits_what_the_first_has_computed(store: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"stores.{store}")
    folders = [tmp_path / name for name in ("store", "one", "two")]
    for folder in folders:
        folder.mkdir()
    with module.running(folders[0]) as options, ExitStack() as stack:
        adapter = folders[0] / "adapter.json"
        adapter.write_text(json.dumps(options))
        one, two = (stack.enter_context(running(str(folder), "--l2-adapter", f"@{adapter}")) for folder in folders[1:])
        make = Engines(stack)
        for server in (one, two):
            eventually(lambda server=server: tier(server)["is_healthy"], f"{store} is in use")
        assert make(one).store(NAMES) == len(NAMES)
        eventually(lambda: puts(one) == len(NAMES), "the store has all chunks")
        engine = make(two)
        found = engine.promote(NAMES)
        assert found.num_chunks == len(NAMES)
        assert all(engine.verified(found, NAMES))
        # and nothing is written twice: the second server finds that the store has it
        assert make(two, rank=0).store([*NAMES, "one more"]) == 1
        eventually(lambda: puts(two) == 1, "the new chunk is written")
