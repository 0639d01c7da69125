"""Objects in an object store (S3, GCS, Azure) or a folder, through obstore: ``PREFIX/1/AB/ABCD…``, key in hex.

One object is one PUT, so the store itself makes it atomic, and no unfinished upload can be left behind. Bytes are
copied once in each direction: obstore takes a body in one piece, and hands one out in memory of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from lmcache.errors import TierError
from lmcache.tiers import object_accounts, object_store, objects
from lmcache.tiers.base import Share, Usage
from lmcache.tiers.object_accounts import Accounts, Marker
from lmcache.tiers.options import Options

FORMAT = objects.VERSION
REQUESTS = 32  # of one call, on their way at a time
DELETES_MAX = 1000  # paths in one request, the limit of S3
PIECE_BYTES = 1 << 20  # copied without a pause: about 0.1 ms
STREAM_BYTES = 16 << 20
REMOTE = ("s3", "gcs", "azure")

T = TypeVar("T")


class ObjectTier:
    """The adapter of type ``object``. See ``docs/tiers.md`` for its options."""

    kind = "ObjectL2Adapter"

    def __init__(self, options: Options) -> None:
        options.require("obstore", "object")
        self._site = object_store.site(options)
        self.backend = self._site.backend
        self.place = self._site.place
        self.survives = self.backend != "memory"
        self.concurrency = options.integer("connections", 8, 1, 256)
        self._store: Any = None
        self._accounts = Accounts(self._markers, self._evict)
        self._problem: str | None = None

    async def open(self) -> None:
        """Reach the store, and see that the bucket is there and open to us."""
        if self._store is None:
            self._store = await asyncio.to_thread(object_store.build, self._site)
        import obstore

        try:
            async for _ in obstore.list(self._store, prefix=f"{FORMAT}/", chunk_size=1):
                break
        except Exception as error:
            raise object_store.failure(self._site, error) from None

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each object, by HEAD."""
        import obstore

        sizes = [0] * len(keys)

        async def ask(index: int) -> None:
            sizes[index] = (await obstore.head_async(self._store, _path(keys[index])))["size"]

        await self._each(range(len(keys)), ask)
        return sizes

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """One PUT; with a limit, two more small ones at least. False: the store or the tenant's share is full."""
        if share.limit_bytes is None:
            return await self._put(key, parts)
        new = object_accounts.marker(key, sum(map(len, parts)))
        before = await self._accounts.reserve(share.tenant, new, share.limit_bytes)
        if isinstance(before, bool):
            return False
        stored = False
        try:
            stored = await self._write(_marker_path(share.tenant, new), b"") and await self._put(key, parts)
        finally:
            self._accounts.settle(share.tenant, new, before, stored)
        stale = before if stored else new
        if stale is not None:
            with contextlib.suppress(TierError):  # then it counts until its turn comes
                await self._remove([_marker_path(share.tenant, stale)])
        return stored

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """One GET; its body is asked for only if the length is right."""
        import obstore

        wanted_bytes = sum(map(len, parts))
        room = _Room(parts)
        try:
            found = await obstore.get_async(self._store, _path(key))
            if found.meta["size"] != wanted_bytes:
                return False
            if self.backend in REMOTE and wanted_bytes >= STREAM_BYTES:
                # faster for long bodies: copied while the rest is on its way, and no fresh memory for all of it
                async for piece in found.stream(min_chunk_size=PIECE_BYTES):
                    await room.take(memoryview(piece))
            else:
                await room.take(memoryview(await found.bytes_async()))
        except Exception as error:
            if object_store.is_absent(error):
                return False
            raise object_store.failure(self._site, error) from None
        return room.exact

    async def delete(self, keys: Sequence[bytes]) -> None:
        """Delete objects, and the markers of those that we know to be counted."""
        await self._remove([_path(key) for key in keys])
        counted = [self._accounts.forget(key) for key in keys]
        await self._remove([_marker_path(tenant, marker) for row in counted for tenant, marker in row.items()])

    async def usage(self) -> Usage:
        """An object store does not tell how much it holds; ``tenant_bytes`` is of those that put with a limit here."""
        return Usage(
            num_evicted=self._accounts.num_evicted,
            tenant_bytes=self._accounts.tenant_bytes() or None,
            problem=self._problem,
        )

    async def close(self) -> None:
        """Nothing is held but idle connections, which go with the store."""
        self._store = None

    async def _put(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        # never the parts themselves where there is but one: a store in memory would keep it, not a copy
        return await self._write(_path(key), list(_pieces(parts)))

    async def _write(self, path: str, body: bytes | list[memoryview]) -> bool:
        import obstore

        try:
            await obstore.put_async(self._store, path, body, use_multipart=False)
        except Exception as error:
            if object_store.is_full(error):
                self._problem = "the store is full: nothing more is stored"
                return False
            raise object_store.failure(self._site, error) from None
        self._problem = None
        return True

    async def _remove(self, paths: Sequence[str]) -> None:
        import obstore

        async def drop(paths: str | list[str]) -> None:
            await obstore.delete_async(self._store, paths)

        if self.backend == "s3":  # elsewhere a path that is absent may end the work on those behind it
            await self._each([list(paths[at : at + DELETES_MAX]) for at in range(0, len(paths), DELETES_MAX)], drop)
        else:
            await self._each(paths, drop)

    async def _each(self, items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Work on all items, some at a time; absent objects are fine.

        Raises:
            TierError: the first failure; nothing is begun any more after it, nor when ``timeout_s`` is over.
        """
        waiting = iter(items)
        deadline = time.monotonic() + self._site.timeout_s
        failures: list[TierError] = []

        async def go_on() -> None:
            for item in waiting:
                if failures:
                    return
                try:
                    if time.monotonic() > deadline:
                        raise TimeoutError("timed out")
                    await work(item)
                except Exception as error:
                    if not object_store.is_absent(error):
                        failures.append(object_store.failure(self._site, error))

        await asyncio.gather(*(go_on() for _ in range(REQUESTS)))
        if failures:
            raise failures[0]

    async def _markers(self, tenant: bytes) -> list[str]:
        """Names of a tenant's markers; one more than anybody counts is enough."""
        import obstore

        names: list[str] = []
        try:
            async for page in obstore.list(self._store, prefix=_tenant_path(tenant), chunk_size=1000):
                names += [str(row["path"]).rpartition("/")[2] for row in page]
                if len(names) > object_accounts.OBJECTS_MAX:
                    break
        except Exception as error:
            raise object_store.failure(self._site, error) from None
        return names

    async def _evict(self, tenant: bytes, victims: Sequence[Marker]) -> None:
        await self._remove([_path(victim.key) for victim in victims])
        await self._remove([_marker_path(tenant, victim) for victim in victims])


def _path(key: bytes) -> str:
    digits = key.hex()
    return f"{FORMAT}/{digits[:2]}/{digits}"


def _tenant_path(tenant: bytes) -> str:
    return f"{FORMAT}-tenants/{tenant.hex()}/"


def _marker_path(tenant: bytes, marker: Marker) -> str:
    return _tenant_path(tenant) + marker.name


class _Room:
    """Where a body goes: parts one behind the other. ``exact``: they are full, and nothing was left over."""

    def __init__(self, parts: Sequence[memoryview]) -> None:
        self._free = deque(_pieces(parts))
        self._over_bytes = 0

    @property
    def exact(self) -> bool:
        return not self._free and not self._over_bytes

    async def take(self, data: memoryview) -> None:
        """Copy what comes next."""
        while data and self._free:
            free = self._free.popleft()
            count = min(len(data), len(free))
            free[:count] = data[:count]
            if count < len(free):
                self._free.appendleft(free[count:])
            data = data[count:]
            await asyncio.sleep(0)
        self._over_bytes += len(data)


def _pieces(parts: Sequence[memoryview]) -> Iterator[memoryview]:
    for part in parts:
        for at in range(0, len(part), PIECE_BYTES):
            yield part[at : at + PIECE_BYTES]
