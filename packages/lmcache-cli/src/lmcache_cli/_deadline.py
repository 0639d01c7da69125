"""A deadline over a call as a whole.

Timeouts of a socket bound each wait, not their sum, and name resolution knows none: a peer that sends one byte a
second, or a dead resolver, would hold a health check for ever.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from lmcache_cli.errors import TimedOut

T = TypeVar("T")


def within(deadline_s: float, call: Callable[[], T], overdue: str) -> T:
    """Run ``call`` and return what it returns, or raise what it raises.

    Args:
        deadline_s: seconds to wait; the abandoned call goes on in a daemon thread, which ends with the process.
        overdue: text of the error when the deadline passes.

    Raises:
        TimedOut: no result within ``deadline_s``.
    """
    results: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((call(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = results.get(timeout=deadline_s)
    except queue.Empty:
        raise TimedOut(overdue) from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]
