"""A tier of another distribution: one SQLite file that holds all objects.

    lmcache server --l2-adapter '{"type": "sqlite", "path": "/data/kv.sqlite", "capacity_gb": 10}'

SQLite makes every put atomic and every eviction one statement. It is slower than `file` for large objects, and handier
for very small ones: a million of them are still one file.
"""

import asyncio
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

from lmcache.errors import TierError
from lmcache.tiers.base import Usage
from lmcache.tiers.catalog import Catalog
from lmcache.tiers.options import GB

PIECE_BYTES = 1 << 20  # copied in one go: what Python copies, nothing else of Python runs beside
TABLE = """
create table if not exists objects (
    key blob primary key, tenant blob not null, bytes integer not null, used_ns integer not null, data blob not null
)
"""


class SqliteTier:
    """The adapter of type ``sqlite``. One thread does all the work, in the order in which it was asked."""

    kind = "SqliteL2Adapter"
    backend = "sqlite"
    survives = True
    concurrency = 1

    def __init__(self, options):
        self.place = os.path.abspath(options.text("path"))
        self._catalog = Catalog(int(options.number("capacity_gb", None, 0.001, 1 << 20) * GB))
        self._thread = ThreadPoolExecutor(1, "tier-sqlite")
        self._database = None

    async def open(self):
        """Lock the file and learn what is in it."""
        await self._run(self._connect)

    async def contains(self, keys):
        """From memory: the file is ours alone."""
        return [self._catalog.size(key) for key in keys]

    async def put(self, key, parts, share):
        """One transaction, together with what has to go."""
        victims = self._catalog.reserve(key, sum(map(len, parts)), share)
        if victims is None:
            return False
        stored = False
        try:
            await self._run(self._write, key, parts, share.tenant, victims)
            stored = True
        finally:
            self._catalog.settle(key, stored)
        return True

    async def get(self, key, parts):
        """Piece by piece from the database's pages into the parts."""
        if self._catalog.size(key) != sum(map(len, parts)):
            return False
        await self._run(self._read, key, parts)
        self._catalog.touch(key)
        return True

    async def delete(self, keys):
        """One transaction."""
        await self._run(self._remove, keys)
        for key in keys:
            self._catalog.remove(key)

    async def usage(self):
        """From memory."""
        return Usage(
            num_objects=len(self._catalog),
            used_bytes=self._catalog.num_bytes,
            capacity_bytes=self._catalog.capacity_bytes,
            num_evicted=self._catalog.num_evicted,
            tenant_bytes=self._catalog.tenant_bytes(),
        )

    async def close(self):
        """Unlock the file."""
        await self._run(self._disconnect)
        self._thread.shutdown()

    async def _run(self, work, *args):
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)
        except (sqlite3.Error, OSError) as error:
            raise TierError(f"{self.place}: {error}") from None

    # --- in the thread

    def _connect(self):
        self._disconnect()  # what an attempt that failed half-way has left
        os.close(os.open(self.place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
        # isolation_level: no transaction is begun but by our own word
        self._database = sqlite3.connect(self.place, 1.0, isolation_level=None, check_same_thread=False)
        self._database.execute("pragma locking_mode = exclusive")
        self._database.execute("pragma journal_mode = wal")
        self._database.execute(TABLE)
        self._catalog.clear()
        for key, num_bytes, tenant in self._database.execute("select key, bytes, tenant from objects order by used_ns"):
            self._catalog.add(key, num_bytes, tenant)

    def _disconnect(self):
        if self._database is not None:
            self._database.close()
            self._database = None

    def _write(self, key, parts, tenant, victims):
        num_bytes = sum(map(len, parts))
        with self._database:
            self._database.execute("begin immediate")
            self._database.executemany("delete from objects where key = ?", [(victim.key,) for victim in victims])
            row = (key, tenant, num_bytes, time.time_ns(), num_bytes)
            made = self._database.execute("insert or replace into objects values (?, ?, ?, ?, zeroblob(?))", row)
            with self._database.blobopen("objects", "data", made.lastrowid) as blob:
                for piece in _pieces(parts):
                    blob.write(piece)

    def _read(self, key, parts):
        rowid = self._database.execute("select rowid from objects where key = ?", (key,)).fetchone()[0]
        with self._database.blobopen("objects", "data", rowid, readonly=True) as blob:
            for piece in _pieces(parts):
                piece[:] = blob.read(len(piece))
        self._database.execute("update objects set used_ns = ? where rowid = ?", (time.time_ns(), rowid))

    def _remove(self, keys):
        with self._database:
            self._database.execute("begin immediate")
            self._database.executemany("delete from objects where key = ?", [(key,) for key in keys])


def _pieces(parts):
    for part in parts:
        for at in range(0, len(part), PIECE_BYTES):
            yield part[at : at + PIECE_BYTES]
