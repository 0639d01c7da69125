"""A server's first and last steps with memory: what fits, opening a pool, removing those of dead servers."""

from __future__ import annotations

from dataclasses import replace

from lmcache.cache.base import PAGE_BYTES, PIECE_BYTES
from lmcache.cache.home import POOL, RECORDS, Home
from lmcache.cache.pool import Pool
from lmcache.cache.records import Header, Records
from lmcache.errors import ConfigError, PoolError
from lmcache.system import File, Files

GB = 1 << 30
SHARED_MEMORY = "/dev/shm"


def default_root(files: Files) -> str:
    """Where this user's pools live, one directory a port."""
    return f"{SHARED_MEMORY}/lmcache-{files.user()}"


def check_fits(total_bytes: int, files: Files, *, reusable_bytes: int = 0, path: str = SHARED_MEMORY) -> None:
    """See that a pool of this size can be had.

    Args:
        reusable_bytes: memory of an earlier pool that will be adopted or removed.

    Raises:
        ConfigError: one sentence with what is wanted, what is free, and the file system's limit.
    """
    space = files.space(path)
    free_bytes = space.free_bytes + reusable_bytes
    if total_bytes < PAGE_BYTES:
        raise ConfigError(f"a pool of {total_bytes} bytes is too small")
    if total_bytes > free_bytes:
        raise ConfigError(
            f"--l1-size-gb {total_bytes / GB:g} does not fit: {free_bytes / GB:.2f} GB are free of the "
            f"{space.total_bytes / GB:.2f} GB that {path} may hold (1 GB = 2^30 bytes)"
        )


def open_pool(
    directory: str, total_bytes: int, chunk_tokens: int, files: Files, *, persist: bool = False
) -> tuple[Pool, Records]:
    """The pool of a directory ``<root>/<port>``: an earlier server's if it can be adopted, else a new, empty one.

    Adoptable are files of this user alone, of this boot, with the same size and geometry, that no server has locked.
    Which chunks are found again is read by ``Cache``. A pool of ``total_bytes`` is rounded down to whole pages.

    Args:
        persist: leave the pool behind at a clean stop; the header says so, and ``sweep_leftovers`` then spares it.

    Raises:
        PoolError: another server uses the directory, or it is not safely ours.
    """
    total_bytes -= total_bytes % PAGE_BYTES
    home = Home(files, directory)
    home.prepare()
    file = home.lock()
    try:
        return _adopted(home, file, total_bytes, chunk_tokens, persist) or _fresh(
            home, file, total_bytes, chunk_tokens, persist
        )
    except BaseException:
        file.close()
        raise


def _adopted(home: Home, file: File, total_bytes: int, chunk_tokens: int, persist: bool) -> tuple[Pool, Records] | None:
    records = Records(file)
    header = records.read_header()
    pool_file = home.open(POOL)
    if pool_file is None:
        return None
    info = pool_file.info()
    expected = Header(home.files.boot_id(), total_bytes, PIECE_BYTES, chunk_tokens, info.inode, persist)
    same = header is not None and replace(header, persist=persist) == expected
    if not same or info.size_bytes != total_bytes:
        pool_file.close()
        return None
    if header != expected:
        records.write_header(expected)
    ready_bytes = min(records.read_ready(), total_bytes)
    return Pool(pool_file, total_bytes, records, home, ready_bytes - ready_bytes % PAGE_BYTES), records


def _fresh(home: Home, file: File, total_bytes: int, chunk_tokens: int, persist: bool) -> tuple[Pool, Records]:
    file.resize(0)
    pool_file = home.create(POOL)
    try:
        pool_file.resize(total_bytes)
        file.resize(PAGE_BYTES)
        records = Records(file)
        header = Header(home.files.boot_id(), total_bytes, PIECE_BYTES, chunk_tokens, pool_file.info().inode, persist)
        records.write_header(header)
    except OSError as error:
        pool_file.close()
        raise PoolError(f"cannot set up the pool in {home.path}: {error.strerror}") from error
    return Pool(pool_file, total_bytes, records, home), records


def sweep_leftovers(root: str, files: Files, *, spare: str = "") -> list[str]:
    """Remove this user's pools of other ports whose server is dead and was not asked to persist; returns their paths.

    A killed server must not hold memory until the next boot. Its pool could be adopted by a later start on the same
    port; that chance is given up when a server starts on another port, unless the dead one ran with ``--l1-persist``.
    Pools of earlier boots and files that are not understood are removed too.

    Args:
        spare: the directory's name (port) that this server is about to open.
    """
    removed = []
    for name in files.names(root):
        home = Home(files, f"{root}/{name}")
        info = files.inspect(home.path)
        if name == spare or info is None or info.kind != "directory" or info.owner != files.user():
            continue
        present = files.names(home.path)
        if not present or not set(present) <= {POOL, RECORDS}:  # about to be used, or not ours to judge
            continue
        file = home.open(RECORDS)
        if file is None or (file.lock() and not _is_kept(file, files)):
            home.remove()
            removed.append(home.path)
        if file is not None:
            file.close()
    return removed


def _is_kept(file: File, files: Files) -> bool:
    header = Records(file).read_header()
    return header is not None and header.persist and header.boot_id == files.boot_id()
