"""Fixtures: a server of each upstream release, once a session, and one of ours with an engine that stored chunks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

for _folder in ("server", "cli"):  # their helpers are ours too: server_running, serving, scripted_engine
    sys.path.append(str(Path(__file__).resolve().parents[1] / _folder))

import server_running  # noqa: E402
import worlds  # noqa: E402

RELEASES = ("0.4.2", "0.4.5", "0.5.0", "0.5.6")


@pytest.fixture(scope="session", params=RELEASES)
def upstream(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[worlds.UpstreamServer]:
    """A real upstream server; every test that asks for it runs against each release."""
    with worlds.upstream_server(request.param, tmp_path_factory.mktemp("upstream")) as server:
        yield server


@pytest.fixture
def our_server(tmp_path: Path) -> Iterator[server_running.Server]:
    """Our server, empty."""
    with server_running.running(str(tmp_path)) as server:
        yield server


@pytest.fixture
def engine(our_server: server_running.Server) -> Iterator[server_running.Engine]:
    """An engine that is registered with ``our_server`` and has stored three chunks there."""
    engine = server_running.Engine(our_server)
    try:
        assert engine.store(["a", "b", "c"]) == 3
        yield engine
    finally:
        engine.close()
