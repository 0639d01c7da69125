"""The pool's file is cut, removed or replaced under a running server and its engines: nobody dies, nobody lies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from server_running import Engines, Server, eventually

SCRIPT = Path(__file__).parent / "reading.py"
NAMES: list[object] = [("cut", number) for number in range(16)]


def stored_in_the_tier(server: Server, engines: Engines) -> None:
    eventually(lambda: tier(server)["is_healthy"])
    assert engines(server).store(NAMES) == len(NAMES)
    eventually(lambda: tier_metric(server, "puts_total") >= len(NAMES), "the tier has them")


def tier(server: Server) -> dict[str, object]:
    (adapter,) = server.status()["storage_manager"]["l2_adapters"]
    assert isinstance(adapter, dict)
    return adapter


def tier_metric(server: Server, name: str) -> float:
    text = server.ask("/metrics")[1]
    return next(float(line.split()[1]) for line in text.splitlines() if line.startswith(f"lmcache_mp_l2_{name}{{"))


@pytest.mark.parametrize("size", [0, 4096, 40 << 10])
def test_a_cut_pool_kills_neither_process_and_costs_the_tier_nothing(own: Server, engines: Engines, size: int) -> None:
    stored_in_the_tier(own, engines)
    service = own.service_pid()
    engine = engines(own)
    own.ask("/cache/clear", b"")
    os.truncate(f"{own.pool_folder}/pool", size)
    engine.promote(NAMES)
    eventually(lambda: own.ask("/healthcheck")[0] == 503)
    assert f"L1's file was cut to {size} of" in own.ask("/healthcheck")[1]["reason"]
    assert "L1's file was cut" in own.status()["reason"]
    assert tier_metric(own, "num_objects") == len(NAMES)
    assert tier_metric(own, "spoiled_total") == 0
    assert own.process.poll() is None
    assert own.service_pid() == service


@pytest.mark.parametrize("deed", ["remove", "replace"])
def test_a_pool_whose_name_is_gone_serves_on(own: Server, engines: Engines, deed: str) -> None:
    stored_in_the_tier(own, engines)
    os.unlink(f"{own.pool_folder}/pool")
    if deed == "replace":
        Path(f"{own.pool_folder}/pool").write_bytes(b"x")
    own.ask("/cache/clear", b"")
    late = engines(own)
    found = late.promote(NAMES)
    assert late.verified(found, NAMES) == [True] * len(NAMES)
    assert own.healthy()


@pytest.mark.parametrize("how", ["checksum", "retrieve", "store", "python", "faulthandler", "populate"])
def test_a_process_that_touches_memory_of_a_cut_pool_goes_on_and_knows(how: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), how], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "noticed\n"


@pytest.mark.parametrize("how", ["elsewhere", "sent"])
def test_other_bus_errors_end_a_process_as_they_always_did(how: str) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), how], capture_output=True, text=True)
    assert done.returncode == -7
    assert done.stdout == ""
