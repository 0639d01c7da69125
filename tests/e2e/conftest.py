"""Models, the server and plain vLLM's answers, shared by the end-to-end tests."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "examples" / "vllm_cpu")]

from engine import Engine, Server  # noqa: E402 - the path is set above
from models import make_model  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """vLLM and torch warn about each other at import; that is not ours to mend."""
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")


CHUNK = 256
BLOCK = 128


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Random token ids, the same for the same seed; a longer one begins with the shorter."""
    numbers = random.Random(seed)
    return [numbers.randrange(2, 4000) for _ in range(num_tokens)]


def expected_hit(num_tokens: int) -> int:
    """Tokens that vLLM must report as cached when all chunks of a prompt are held: the last one is always computed."""
    return min(num_tokens // CHUNK * CHUNK, num_tokens - 1)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    """Poll until true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"never happened: {what}"
        time.sleep(0.02)


def num_objects(server: Server) -> int:
    """Chunks that the server holds."""
    return int(server.status()["storage_manager"]["l1_manager"]["total_object_count"])


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of models, kept between runs where the session that runs us says so."""
    kept = os.environ.get("LMCACHE_TEST_MODELS")
    return Path(kept) if kept else tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny(models: Path) -> Path:
    """Two layers of Llama."""
    return make_model(models / "tiny-llama", "tiny-llama")


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of logs."""
    return tmp_path_factory.mktemp("logs")


class Plain:
    """Stock vLLM without us: what the answers must be. Each prompt is computed once, by itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[tuple[int, ...], list[int]] = {}

    def tokens(self, prompts: list[list[int]], max_tokens: int = 16) -> list[list[int]]:
        """Greedy tokens of each prompt."""
        for entry in prompts:
            key = (max_tokens, *entry)
            if key not in self._known:
                self._known[key] = self._engine.generate([entry], max_tokens)["tokens"][0]
        return [self._known[(max_tokens, *entry)] for entry in prompts]


@pytest.fixture(scope="session")
def plain(tiny: Path, logs: Path) -> Iterator[Plain]:
    """The reference for the tiny Llama."""
    with Engine(tiny, logs, enable_prefix_caching=False) as engine:
        yield Plain(engine)


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[Server]:
    """A server of this module's own."""
    with Server(logs) as running:
        yield running


@pytest.fixture(scope="module")
def engine(tiny: Path, logs: Path, server: Server) -> Iterator[Engine]:
    """vLLM with our connector and without a prefix cache of its own, so that every hit is ours."""
    with Engine(tiny, logs, server.port, enable_prefix_caching=False) as running:
        yield running
