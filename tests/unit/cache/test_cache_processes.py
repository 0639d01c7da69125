"""The pool's promises about real processes, on the real /dev/shm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_worlds import MIB, held, keys, store
from memory_files import ManualClock

import lmcache
from lmcache.cache import open_cache
from lmcache.cache.store import Cache
from lmcache.errors import PoolError
from lmcache.system import SystemEntropy, SystemFiles

SOURCES = str(Path(lmcache.__path__[0]).parent)

SERVER = """
import os, socket, sys, time
from lmcache.cache import open_cache
from lmcache.system import SystemClock, SystemEntropy, SystemFiles

cache = open_cache(sys.argv[1], 64 << 20, 256, policy="LRU", persist=False, files=SystemFiles(), clock=SystemClock(),
                   entropy=SystemEntropy())
key = (1).to_bytes(32, "big")
committed = cache.reserve(1, key, rank=0, world_size=1, extent_bytes=1 << 20)
cache.commit(1, committed.ticket, [1])
fd, slot = cache.pool.grant_descriptor()
cache.attach_writer(2, slot)
reserved = cache.reserve(2, (2).to_bytes(32, "big"), rank=0, world_size=1, extent_bytes=1 << 20)
with socket.socket(fileno=int(sys.argv[2])) as channel:
    socket.send_fds(channel, [str(reserved.offsets[0]).encode()], [fd])
os.close(fd)
print(slot, flush=True)
time.sleep(600)
"""

WRITER = """
import mmap, os, socket, sys

with socket.socket(fileno=int(sys.argv[1])) as channel:
    offset, (fd,), _, _ = socket.recv_fds(channel, 100, 1)
pool = mmap.mmap(fd, 0)
os.close(fd)
print("mapped", flush=True)
sys.stdin.readline()
pool[int(offset)] = 7
print("written", flush=True)
sys.stdin.readline()
"""


def start(code: str, *arguments: str, channel: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments, str(channel)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCES, *filter(None, sys.path)])}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[channel], env=environment
    )


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def directory() -> Iterator[str]:
    root = f"/dev/shm/lmcache-test-{os.getpid()}"
    yield f"{root}/1"
    files = SystemFiles()
    for path in (f"{root}/1/pool", f"{root}/1/records", f"{root}/1", root):
        files.remove(path)


def open_here(directory: str, clock: ManualClock) -> Cache:
    return open_cache(
        directory, 64 * MIB, 256, policy="LRU", persist=False, files=SystemFiles(), clock=clock, entropy=SystemEntropy()
    )


def test_an_extent_stays_aside_while_a_process_that_outlived_the_server_maps_the_pool(directory: str) -> None:
    import socket

    ours, theirs = socket.socketpair()
    processes = [start(SERVER, directory, channel=ours.fileno()), start(WRITER, channel=theirs.fileno())]
    server, writer = processes
    try:
        slot = int(said(server))
        assert said(writer) == "mapped"
        with pytest.raises(PoolError, match="in use by another server"):
            open_here(directory, ManualClock())
        os.kill(server.pid, signal.SIGKILL)
        server.wait(30)
        clock = ManualClock()
        cache = open_here(directory, clock)
        assert held(cache, 1, 3) == [1]
        assert cache.pool.writer_alive(slot)
        assert cache.usage().set_aside_bytes == MIB
        tell(writer)
        assert said(writer) == "written"
        assert list(store(cache, 100, 170)).count(1) == 63, "all but the extent that is being written"
        tell(writer)
        writer.wait(30)
        assert not cache.pool.writer_alive(slot)
        clock.seconds += 1
        cache.sweep()
        assert cache.usage().set_aside_bytes == 0
        cache.check_integrity()
        cache.close(persist=False)
        assert not os.path.exists(directory)
    finally:
        for process in processes:
            process.kill()
            process.communicate()
        ours.close()
        theirs.close()


def test_the_files_are_closed_to_everybody_else_and_the_memory_of_the_pool_exists(directory: str) -> None:
    cache = open_here(directory, ManualClock())
    assert cache.pool.grow(16 * MIB) == 16 * MIB
    status = os.stat(f"{directory}/pool")
    assert (status.st_mode & 0o777, status.st_size, status.st_blocks * 512) == (0o600, 64 * MIB, 16 * MIB)
    assert os.stat(f"{directory}/records").st_mode & 0o777 == 0o600
    assert os.stat(directory).st_mode & 0o777 == 0o700
    store(cache, 0, 3)
    cache.check_integrity()
    cache.close(persist=False)


def test_a_symbolic_link_in_place_of_the_pool_is_replaced_and_not_followed(directory: str, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_text("precious")
    open_here(directory, ManualClock()).close(persist=True)
    for name in ("pool", "records"):
        os.unlink(f"{directory}/{name}")
        os.symlink(target, f"{directory}/{name}")
    cache = open_here(directory, ManualClock())
    store(cache, 0, 2)
    assert target.read_text() == "precious"
    assert cache.lookup(1, keys(0, 2)).num_chunks == 2
    cache.close(persist=False)
