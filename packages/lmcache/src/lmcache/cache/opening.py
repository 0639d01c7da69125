"""A server's first and last steps with memory: what fits, opening a pool, removing those of dead servers."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.cache.base import PAGE_BYTES, PIECE_BYTES
from lmcache.cache.home import POOL, RECORDS, Home, check_instance
from lmcache.cache.pool import Pool
from lmcache.cache.records import VERSION, Header, Records
from lmcache.errors import ConfigError, PoolError
from lmcache.system import File, Files

GB = 1 << 30
SHARED_MEMORY = "/dev/shm"


def default_root(files: Files) -> str:
    """Where this user's pools live, one directory an instance."""
    return f"{SHARED_MEMORY}/lmcache-{files.user()}"


def pool_directory(root: str, instance: str) -> str:
    """Where the pool of an instance lives.

    Raises:
        ConfigError: the instance's name cannot be that of a directory.
    """
    return f"{root}/{check_instance(instance)}"


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
    directory: str,
    total_bytes: int,
    chunk_tokens: int,
    files: Files,
    *,
    persist: bool = False,
    note: Callable[[str], None] | None = None,
) -> tuple[Pool, Records]:
    """The pool of a directory ``<root>/<instance>``: an earlier server's if it can be adopted, else a new, empty one.

    Adoptable are files of this user alone, of this boot, with the same size and geometry and of the same version, that
    no server has locked. Those that are not are removed, also if they were to persist: they would hold memory that
    nobody else can use. Which chunks are found again is read by ``Cache``. A pool of ``total_bytes`` is rounded down to
    whole pages.

    Args:
        persist: leave the pool behind at a clean stop; the header says so, and ``sweep_leftovers`` then spares it.
        note: told, in one sentence, why what an earlier server left is not used; not called where nothing was left.

    Raises:
        PoolError: another server uses the directory, or it is not safely ours.
    """
    total_bytes -= total_bytes % PAGE_BYTES
    home = Home(files, directory)
    home.prepare()
    left = [name for name in (POOL, RECORDS) if files.inspect(f"{directory}/{name}")]
    doubts = [f"its file {name} {doubt}" for name in left if (doubt := home.distrust(name))]
    file = home.lock()
    try:
        adopted = _adopted(home, file, total_bytes, chunk_tokens, persist)
        if not isinstance(adopted, str):
            return adopted
        fresh = _fresh(home, file, total_bytes, chunk_tokens, persist)
    except BaseException:
        file.close()
        raise
    if left and note is not None:
        reason = "; ".join(doubts) or adopted
        note(f"the L1 that the server before left is not used and was removed: {reason}")
    return fresh


def _adopted(home: Home, file: File, total_bytes: int, chunk_tokens: int, persist: bool) -> tuple[Pool, Records] | str:
    """The pool that is there, or why it cannot be used."""
    records = Records(file)
    pool_file = home.open(POOL)
    if pool_file is None:
        return "its pool file is missing"
    info = pool_file.info()
    header = records.read_header()
    expected = Header(home.files.boot_id(), total_bytes, PIECE_BYTES, chunk_tokens, info.inode, persist)
    difference = _difference(header, expected, records.read_version(), info.size_bytes)
    if difference:
        pool_file.close()
        return difference
    if header != expected:
        records.write_header(expected)
    ready_bytes = min(records.read_ready(), total_bytes)
    return Pool(pool_file, total_bytes, records, home, ready_bytes - ready_bytes % PAGE_BYTES), records


def _difference(header: Header | None, expected: Header, version: int | None, size_bytes: int) -> str:
    """What keeps a pool of this header from being used, both values each; empty where nothing does."""
    if header is None:
        if version is not None and version != VERSION:
            return f"its records have version {version}, this server has {VERSION}"
        return "its records have no header that can be read"
    differences = []
    if header.boot_id != expected.boot_id:
        differences.append("it is from before this machine was last started")
    for option, theirs, ours in (
        ("--l1-size-gb", f"{header.pool_bytes / GB:.12g}", f"{expected.pool_bytes / GB:.12g}"),
        ("--chunk-size", str(header.chunk_tokens), str(expected.chunk_tokens)),
        ("pieces of", f"{header.piece_bytes} bytes", f"{expected.piece_bytes} bytes"),
    ):
        if theirs != ours:
            differences.append(f"it was made with {option} {theirs}, this server has {ours}")
    if header.pool_inode != expected.pool_inode:
        differences.append(f"its records are of pool file {header.pool_inode}, the one there is {expected.pool_inode}")
    if size_bytes != header.pool_bytes:
        differences.append(f"its pool file has {size_bytes} bytes, its records say {header.pool_bytes}")
    return "; ".join(differences)


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
    """Remove this user's pools of other instances whose server is dead and was not asked to persist; returns the paths.

    A killed server must not hold memory until the next boot. Its pool could be adopted by a later start of the same
    instance; that chance is given up when another one starts, unless the dead one ran with ``--l1-persist``. Pools of
    earlier boots and files that are not understood are removed too.

    Args:
        spare: name of the instance that is about to open its pool.
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
