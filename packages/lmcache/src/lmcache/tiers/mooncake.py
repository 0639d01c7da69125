"""Objects in Mooncake Store: memory of several machines, found through one `mooncake_master`.

The library copies straight between the parts and the node that holds an object, over TCP or RDMA, and reconnects by
itself to a master that died and came back. Three things about it shape this module. Its settings are environment
variables that are read when it is loaded, so the deadlines of the first tier of a process hold for all. Preparing a
client holds Python's lock until the master has answered, so the master is asked for a sign of life beforehand. And a
client that was closed must not be called again, or the process dies: ``close`` waits for the calls under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import math
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from lmcache.errors import TierError
from lmcache.tiers.base import CALL_S, Share, Usage
from lmcache.tiers.options import GB, Options

Result = TypeVar("Result")

_FULL, _BUFFER_TOO_SMALL, _NOT_READY, _NOT_FOUND, _TRANSFER_FAILED = -200, -600, -703, -704, -800
_REASONS = {
    _TRANSFER_FAILED: "the node that holds the bytes did not take or give them",
    -900: "the master cannot be reached",
    -901: "the master did not answer in time",
}
_LOOKUPS = 2  # threads beyond ``concurrency``, so that ``contains`` does not wait behind slow transfers
_BATCH = 1024  # keys a request
_PROBE = bytes(64)  # no request of the master's protocol: it hangs up on it, which a stopped one does not


class MooncakeTier:
    """One client of a Mooncake Store. With ``segment_gb`` it is also a node, whose memory ends with this process."""

    kind = "MooncakeStoreL2Adapter"
    concurrency = 4  # hides the master's round trips; where nodes share our cores, fewer would be faster

    def __init__(self, options: Options) -> None:
        """Read the options.

        Raises:
            ConfigError: an option is missing or out of its bounds, or the library is not installed.
        """
        options.require("mooncake", "mooncake")
        self._master = options.text("master")
        host, _, port = self._master.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise options.error("'master' is HOST:PORT")
        self._address = (host.strip("[]"), int(port))
        self._protocol = options.text("protocol", "tcp")
        if self._protocol not in ("tcp", "rdma"):
            raise options.error("'protocol' is 'tcp' or 'rdma'")
        self._metadata = options.text("metadata", "P2PHANDSHAKE")
        self._device = options.text("device", "")
        self._hostname = options.text("local_hostname", "")
        self._segment_bytes = int(options.number("segment_gb", 0.0, 0.0, 1 << 20) * GB)
        self._buffer_bytes = int(options.number("buffer_gb", 1 / 64, 1 / 64, 1024.0) * GB)
        self._replicas = options.integer("replicas", 1, 1, 16)
        self._prefix = options.text("prefix", "lmcache-")
        self._timeout_s = options.number("timeout_s", CALL_S, 1.0, 600.0)
        self.backend = f"mooncake_{self._protocol}"
        self.place = self._master
        self.survives = self._segment_bytes == 0
        self._threads = ThreadPoolExecutor(self.concurrency + _LOOKUPS, "tier-mooncake")
        self._store: Any = None
        self._config: Any = None
        self._memory = RegisteredMemory()

    async def open(self) -> None:
        """Join the store.

        Raises:
            TierError: the library cannot be loaded, or the master does not answer.
        """
        await self._run(self._join)

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """See ``Tier``."""
        return await self._run(self._sizes, keys)

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """See ``Tier``. A tenant's bytes cannot be counted, since other servers write too.

        An older object of the key goes even if another server reads it at this moment, and what takes its memory may
        reach that reader: the checksums in the header tell it. The store's own rule, to wait ten seconds after the last
        look at an object, would keep a damaged one for ever, since every lookup is a look.
        """
        if share.limit_bytes is not None:
            return False
        return await self._run(self._write, key, parts)

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """See ``Tier``."""
        return await self._run(self._read, key, parts)

    async def delete(self, keys: Sequence[bytes]) -> None:
        """See ``Tier``. Does not wait for the leases of readers: see ``put``."""
        await self._run(self._remove, keys)

    async def usage(self) -> Usage:
        """Nothing is known here: the store counts in its master, for all clients together."""
        return Usage()

    async def close(self) -> None:
        """See ``Tier``."""
        await asyncio.get_running_loop().run_in_executor(None, self._leave)

    async def _run(self, function: Callable[..., Result], *args: object) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _join(self) -> None:
        self._set_environment()
        try:
            from mooncake.store import MooncakeDistributedStore, ReplicateConfig
        except ImportError as error:
            raise TierError(f"the library mooncake cannot be loaded: {error}") from None
        local = self._probe_master()
        store = MooncakeDistributedStore()
        code = store.setup(
            {
                "local_hostname": self._hostname or local,
                "metadata_server": self._metadata,
                "global_segment_size": str(self._segment_bytes),
                "local_buffer_size": str(self._buffer_bytes),
                "protocol": self._protocol,
                "rdma_devices": self._device,
                "master_server_addr": self._master,
            }
        )
        if code != 0:
            store.close()
            raise TierError(f"Mooncake Store at {self._master} cannot be joined ({_reason(code)})")
        config = ReplicateConfig()
        config.replica_num = self._replicas
        self._store, self._config = store, config

    def _set_environment(self) -> None:
        """Settings of the library, where the operator gave none."""
        timeout_ms, timeout_s = str(int(self._timeout_s * 1000)), str(math.ceil(self._timeout_s))
        for name, value in {
            "MC_RPC_TIMEOUT_MS": timeout_ms,
            "MC_RPC_CONNECT_TIMEOUT_MS": timeout_ms,
            "MC_TCP_PROGRESS_TIMEOUT_SEC": timeout_s,
            "MC_TCP_STATUS_TIMEOUT_SEC": timeout_s,
            "MC_TCP_ADMISSION_TIMEOUT_MS": timeout_ms,
            "MC_STORE_CLIENT_SETUP_RETRIES": "1",
            "MC_LOG_LEVEL": "ERROR",
        }.items():
            os.environ.setdefault(name, value)

    def _probe_master(self) -> str:
        """See that a live process answers at the master's port, and with which address of ours it is reached."""
        try:
            with socket.create_connection(self._address, self._timeout_s) as connection:
                connection.sendall(_PROBE)
                with contextlib.suppress(ConnectionResetError):
                    connection.recv(1)
                return str(connection.getsockname()[0])
        except OSError as error:
            reason = error.strerror or "no answer in time"
            raise TierError(f"the Mooncake master at {self._master} cannot be reached: {reason}") from None

    def _sizes(self, keys: Sequence[bytes]) -> list[int]:
        store, sizes = self._joined(), []
        for names in self._names(keys):
            found = store.batch_is_exist(names)
            failed = [code for code in found if code < 0]
            if failed:
                raise self._failure("look", failed[0])
            present = [name for name, code in zip(names, found, strict=True) if code == 1]
            replicas = store.batch_get_replica_desc(present) if present else {}
            sizes += [_object_bytes(replicas.get(name, ())) for name in names]
        return sizes

    def _write(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        store, addresses, sizes = self._prepared(parts)
        # A put of a name that exists is taken for done, whatever its bytes.
        self._remove([key])
        code = store.batch_put_from_multi_buffers([self._name(key)], [addresses], [sizes], self._config)[0]
        if code == _FULL:
            return False
        if code != 0:
            raise self._failure("store", code)
        return True

    def _read(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        store, addresses, sizes = self._prepared(parts)
        name = self._name(key)
        code = store.batch_get_into_multi_buffers([name], [addresses], [sizes])[0]
        if code == _TRANSFER_FAILED:
            # Also what it says of an object that is shorter than the parts.
            found = store.get_size(name)
            if found not in (sum(sizes), _TRANSFER_FAILED):
                code = _NOT_FOUND if found >= 0 else found
        if code >= 0 or code in (_NOT_FOUND, _NOT_READY, _BUFFER_TOO_SMALL):
            return bool(code == sum(sizes))
        raise self._failure("load", code)

    def _remove(self, keys: Sequence[bytes]) -> None:
        store = self._joined()
        for names in self._names(keys):
            for code in store.batch_remove(names, True):
                if code not in (0, _NOT_FOUND, _NOT_READY):
                    raise self._failure("delete", code)

    def _name(self, key: bytes) -> str:
        return self._prefix + key.hex()

    def _names(self, keys: Sequence[bytes]) -> Iterator[list[str]]:
        for start in range(0, len(keys), _BATCH):
            yield [self._name(key) for key in keys[start : start + _BATCH]]

    def _prepared(self, parts: Sequence[memoryview]) -> tuple[Any, list[int], list[int]]:
        """The store, and addresses and bytes of the parts, which it may use from now on."""
        store = self._joined()
        if self._protocol == "rdma":
            self._memory.cover(store, parts)
        return store, [address_of(part) for part in parts], [part.nbytes for part in parts]

    def _joined(self) -> Any:
        if self._store is None:
            raise TierError(f"Mooncake Store at {self._master} was not joined")
        return self._store

    def _failure(self, what: str, code: int) -> TierError:
        return TierError(f"Mooncake Store at {self._master} failed to {what}: {_reason(code)}")

    def _leave(self) -> None:
        self._threads.shutdown()
        if self._store is not None:
            self._store.close()
            self._store = None


class RegisteredMemory:
    """Memory that a network card may read and write: the whole mapping that a part lies in, once."""

    def __init__(self) -> None:
        self._known: dict[int, int] = {}  # address: bytes

    def cover(self, store: Any, parts: Sequence[memoryview]) -> None:
        """Register what is not yet.

        Raises:
            TierError: the library refuses.
        """
        for part in parts:
            with memoryview(part.obj).cast("B") as mapping:
                address, size = address_of(mapping), mapping.nbytes
            if self._known.get(address) == size:
                continue
            if address in self._known:
                store.unregister_buffer(address)
            code = store.register_buffer(address, size)
            if code != 0:
                raise TierError(f"Mooncake cannot register {size} bytes of memory for transfers ({_reason(code)})")
            self._known[address] = size


def address_of(part: memoryview) -> int:
    """Where a writable buffer lies in this process."""
    return ctypes.addressof(ctypes.c_char.from_buffer(part))


def _object_bytes(replicas: Sequence[Any]) -> int:
    """Bytes of the first whole copy in memory; 0 where there is none."""
    for replica in replicas:
        if replica.is_memory_replica() and replica.status.name == "COMPLETE":
            return int(replica.get_memory_descriptor().buffer_descriptor.size)
    return 0


def _reason(code: int) -> str:
    return _REASONS.get(code, f"its code {code}")
