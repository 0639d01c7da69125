"""An event loop whose time passes only when nothing else is left to do, so that deadlines cost no test any seconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Never sleeps: what would be slept is added to ``seconds``."""

    seconds = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Ready descriptors; none, and later."""
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everything waits for something that will never happen"
            self.seconds += max(0.0, timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """Use with ``run``."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual.seconds


def run(test: Coroutine[Any, Any, T]) -> T:
    """Run one coroutine to its end in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(test)


class VirtualClock:
    """The running loop's time as ``system.Clock``."""

    def now(self) -> float:
        """Virtual seconds."""
        return asyncio.get_running_loop().time()
