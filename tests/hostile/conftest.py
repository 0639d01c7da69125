"""A server with a tier, a well-behaved engine in a process of its own, and what an attack may cost at most."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "server"), str(Path(__file__).parent)]

from server_running import Engines, Server, running  # noqa: E402 - the path is set above


@pytest.fixture(scope="session")
def besieged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that all attacks of a session fall upon, one after the other: what one leaves behind, the next meets."""
    folder = str(tmp_path_factory.mktemp("besieged"))
    with running(folder, "--l2-path", f"{folder}/l2", "--l2-size-gb", "1") as server:
        yield server


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server with a tier that the test may break."""
    with running(str(tmp_path), "--l2-path", str(tmp_path / "l2"), "--l2-size-gb", "1") as server:
        yield server


@pytest.fixture
def engines() -> Iterator[Engines]:
    with ExitStack() as stack:
        yield Engines(stack)
