"""One server for the tests that leave it as they found it; their own for those that do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from server_running import Engines, Server, running


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that many tests use; what they store stays."""
    with running(str(tmp_path_factory.mktemp("shared"))) as server:
        yield server


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server that the test may kill."""
    with running(str(tmp_path)) as server:
        yield server


@pytest.fixture
def engines() -> Iterator[Engines]:
    with ExitStack() as stack:
        yield Engines(stack)
