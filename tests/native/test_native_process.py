"""How a call behaves inside an engine's process: the GIL, pinned callers, threads, page tables."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native_worlds as worlds
import numpy as np
import pytest

from lmcache.transfer import _native

MIB = 1 << 20
PAGE_BYTES = mmap.PAGESIZE
WAIT_S = 20.0


@pytest.fixture(scope="module")
def large() -> worlds.World:
    """A plan of 64 MiB: long enough to be watched."""
    return worlds.World.of_runs([MIB], 64, [tuple(range(64))], threads=2)


@pytest.fixture
def no_forced_switch() -> Iterator[None]:
    """Only a thread that lets go of the GIL lets another one run."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("no_forced_switch")
def test_another_thread_runs_while_a_store_copies(large: worlds.World) -> None:
    go, ran = threading.Event(), []

    def other() -> None:
        go.wait(WAIT_S)
        ran.append(True)

    thread = threading.Thread(target=other)
    thread.start()
    go.set()
    for _ in range(100):
        large.store()
        if ran:
            break
    assert ran
    thread.join(WAIT_S)


def _cpus_of(task: Path) -> str | None:
    try:
        status = (task / "status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return next(line.split()[1] for line in status.splitlines() if line.startswith("Cpus_allowed_list:"))


def test_copying_threads_may_use_every_cpu_whatever_the_caller_is_pinned_to(large: worlds.World) -> None:
    everywhere = _cpus_of(Path("/proc/thread-self"))
    done = threading.Event()

    def pinned() -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        deadline = time.monotonic() + WAIT_S
        while not done.is_set() and time.monotonic() < deadline:
            large.store()

    with ThreadPoolExecutor(1) as pool:
        known = set(os.listdir("/proc/self/task"))
        call = pool.submit(pinned)
        caller = None
        seen: set[str | None] = set()
        while not call.done() and everywhere not in seen:
            for name in set(os.listdir("/proc/self/task")) - known:
                caller = caller or name  # the first new thread is the pool's own
                if name != caller:
                    seen.add(_cpus_of(Path("/proc/self/task", name)))
        done.set()
        call.result(WAIT_S)
    assert everywhere in seen


def test_no_thread_outlives_its_call(large: worlds.World) -> None:
    before = set(os.listdir("/proc/self/task"))
    large.store()
    deadline = time.monotonic() + WAIT_S
    while set(os.listdir("/proc/self/task")) - before and time.monotonic() < deadline:
        time.sleep(0.001)  # a joined thread leaves /proc a moment later
    assert set(os.listdir("/proc/self/task")) <= before


def test_a_child_that_was_forked_after_a_call_can_copy(large: worlds.World) -> None:
    expected = large.store()
    child = os.fork()
    if child == 0:
        os._exit(0 if large.store() == expected else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _resident_bytes(address: int) -> int:
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            rss = next(line for line in lines if line.startswith("Rss:"))
            return int(rss.split()[1]) * 1024
    raise AssertionError("no such mapping")


def test_populate_enters_the_pages_of_its_range() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        os.posix_fallocate(file.fileno(), 0, 2 * MIB)
        pool = np.frombuffer(mmap.mmap(file.fileno(), 2 * MIB), np.uint8)
    assert _resident_bytes(pool.ctypes.data) == 0
    _native.populate(pool, MIB, MIB)
    assert _resident_bytes(pool.ctypes.data) == MIB
    assert not pool.any()


def test_populate_of_pages_that_the_file_no_longer_has_is_an_error_and_no_signal() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(2 * PAGE_BYTES)
        pool = mmap.mmap(file.fileno(), 2 * PAGE_BYTES)
        file.truncate(PAGE_BYTES)
        with pytest.raises(OSError, match=os.strerror(errno.EFAULT)) as caught:
            _native.populate(pool, 0, 2 * PAGE_BYTES)
    assert caught.value.errno == errno.EFAULT


def test_populate_reports_what_madvise_said() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)) as caught:
        _native.populate(worlds.tmpfs_pool(2 * PAGE_BYTES), 1, PAGE_BYTES)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 3 * PAGE_BYTES), (2 * PAGE_BYTES, 1), (2**64 - 1, 2), (-1, 1), (0, -1), (0, 2**64)]
)
def test_populate_outside_the_pool_is_refused(offset: int, length: int) -> None:
    with pytest.raises(ValueError, match=r"outside the pool|must be between"):
        _native.populate(worlds.tmpfs_pool(2 * PAGE_BYTES), offset, length)
