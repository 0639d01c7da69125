"""Code that blocks, on a thread of its own that only ever runs while everybody else waits for it."""

from __future__ import annotations

import _thread
import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from .kernel import Dead, check_alive


class _Strand:
    """A thread that is handed the turn and hands it back. Threads are kept for the next world."""

    idle: ClassVar[list[_Strand]] = []
    here = threading.local()

    def __init__(self) -> None:
        self.go, self.back = _thread.allocate_lock(), _thread.allocate_lock()
        self.go.acquire()
        self.back.acquire()
        self.work: Callable[[], Any] | None = None
        self.wanted: Callable[[], Awaitable[Any]] | None = None  # what it waits for; None when it is done
        self.value: Any = None
        self.error: BaseException | None = None
        threading.Thread(target=self._run, name="sim strand", daemon=True).start()

    def _run(self) -> None:
        _Strand.here.strand = self
        while True:
            self.go.acquire()
            work, self.work = self.work, None
            assert work is not None
            try:
                self.value, self.error = work(), None
            except BaseException as error:
                self.value, self.error = None, error.with_traceback(error.__traceback__)
            del work
            self.wanted = None
            self.back.release()

    def advance(self) -> None:
        """Let it run until it waits for something or is done."""
        self.go.release()
        self.back.acquire()


async def on_strand(work: Callable[..., Any], *args: Any) -> Any:
    """Run blocking code of the current process; everybody else's turns come while it waits."""
    strand = _Strand.idle.pop() if _Strand.idle else _Strand()
    strand.work = lambda: work(*args)
    strand.advance()
    while (wanted := strand.wanted) is not None:
        try:
            strand.value, strand.error = await wanted(), None
        except BaseException as error:
            strand.value, strand.error = None, error
        strand.advance()
    value, error = strand.value, strand.error
    strand.value = strand.error = None
    _Strand.idle.append(strand)
    if error is not None:
        if isinstance(error, Dead):
            raise asyncio.CancelledError
        raise error
    return value


def block(wanted: Callable[[], Awaitable[Any]]) -> Any:
    """Wait for something on a strand.

    Raises:
        Dead: the process was killed meanwhile.
    """
    process = check_alive()
    strand: _Strand = _Strand.here.strand
    strand.wanted = wanted
    strand.back.release()
    strand.go.acquire()
    value, error = strand.value, strand.error
    strand.value = strand.error = None
    if not process.is_alive:
        raise Dead
    if error is not None:
        raise error
    return value
