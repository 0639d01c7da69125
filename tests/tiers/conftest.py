"""Real stores for the conformance suite: every module of ``stores`` whose libraries and programs are installed."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import pkgutil
import shutil
from collections.abc import Awaitable, Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import pytest
import stores
from making import Pool

from lmcache.tiers import make_tier
from lmcache.tiers.base import Tier

HANG_S = 120.0
"""No test takes so long; one that does is stuck."""

Result = TypeVar("Result")
Options = dict[str, Any]
Use = Callable[[Callable[[Tier], Awaitable[Result]]], Result]

MODULES = [importlib.import_module(f"stores.{info.name}") for info in pkgutil.iter_modules(stores.__path__)]


def run_with_tier(options: Options, work: Callable[[Tier], Awaitable[Result]]) -> Result:
    """See the fixture ``use``."""

    async def main() -> Result:
        tier = make_tier(options)
        try:
            await tier.open()
            return await work(tier)
        finally:
            await tier.close()

    return asyncio.run(asyncio.wait_for(main(), HANG_S))


def _lacking(module: ModuleType) -> str | None:
    for name in getattr(module, "REQUIRES", ()):
        if importlib.util.find_spec(name) is None:
            return f"no package {name}"
    for name in getattr(module, "PROGRAMS", ()):
        if shutil.which(name) is None:
            return f"no program {name}"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of a tier that keeps nothing, what is said of kept objects is not asked."""
    asked, left_out = [], []
    for item in items:
        module = getattr(getattr(item, "callspec", None), "params", {}).get("store")
        is_meant = "keeper" not in getattr(item, "fixturenames", ()) or getattr(module, "KEEPS", True)
        (asked if is_meant else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = asked


@pytest.fixture(scope="module", params=MODULES, ids=lambda module: module.NAME)
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Options]:
    """Options of a tier on a running store, one store for all tests of a file."""
    lacking = _lacking(request.param)
    if lacking:
        pytest.skip(lacking)
    with request.param.running(tmp_path_factory.mktemp(request.param.NAME)) as options:
        yield {**options}


@pytest.fixture
def keeper(store: Options) -> Options:
    """``store``, of those that keep what they are given."""
    return store


@pytest.fixture
def pool() -> Iterator[Pool]:
    """Memory for objects; at the end of the test nobody may have written beside them."""
    made = Pool()
    yield made
    assert made.is_whole(), "bytes beside the parts were changed"


@pytest.fixture
def use() -> Use[Any]:
    """Runs some work with a tier that is opened before and closed after it."""
    return run_with_tier
