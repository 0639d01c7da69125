"""Joins the core's parts: endpoints, pool, loop; and frees them in the opposite order."""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from lmcache.cache.base import Limits
from lmcache.cache.evict import make_policy
from lmcache.cache.home import POOL
from lmcache.cache.opening import check_fits, default_root, open_pool, pool_directory, sweep_leftovers
from lmcache.cache.pool import Pool
from lmcache.cache.records import Records
from lmcache.cache.store import Cache
from lmcache.config import GB, ServerConfig
from lmcache.errors import ConfigError, PoolBusy, WireError
from lmcache.metrics import Counters
from lmcache.server import report
from lmcache.server.core import Core, Ends
from lmcache.server.dispatch import Dispatcher
from lmcache.server.growth import Growth
from lmcache.server.limits_file import LimitsFile, state_folder
from lmcache.server.ports import PortInUse
from lmcache.server.promotions import Promotions
from lmcache.server.sessions import Instance, Sessions
from lmcache.server.supervisor import Supervisor
from lmcache.server.tenant_secret import tenant_secret
from lmcache.server.tenants import Tenants
from lmcache.server.tiering import Tiering
from lmcache.system import SystemClock, SystemEntropy, SystemFiles
from lmcache.wire import messages as m
from lmcache.wire.client import LOCAL_SCHEME
from lmcache.wire.door import Door
from lmcache.wire.local import LocalListener
from lmcache.wire.poller import Poller
from lmcache.wire.tcp import AddressInUse, TcpListener
from lmcache.wire.unix_listener import UnixListener
from lmcache_cli._version import __version__

SERVER_ID_BYTES = 16
LOCK_S, LOCK_PAUSE_S = 2.0, 0.05

log = logging.getLogger("lmcache.core")


@dataclass(frozen=True)
class Plan:
    """What ``run.serve`` found out before the core's own imports."""

    config: ServerConfig
    attach_path: str
    gid: int | None
    rpc_endpoint: str

    @property
    def local_path(self) -> str:
        """The socket of attached processes, beside the attach socket."""
        return self.attach_path + ".rpc"


def run_core(
    plan: Plan, supervisor: Supervisor, wake: socket.socket, waker: socket.socket, announce: Callable[[], None]
) -> None:
    """Run until a stop signal arrives on ``wake``; everything is closed and removed on the way out.

    Raises:
        LMCacheError: an endpoint or the memory cannot be had.
    """
    clock, counters, sessions = SystemClock(), Counters(), Sessions(SystemEntropy())
    sessions.expect_service(supervisor.token)
    with contextlib.ExitStack() as stack:
        poller = Poller()
        stack.callback(poller.close)
        tcp = _bind_port(plan)
        stack.callback(tcp.close)
        door = Door(plan.attach_path, plan.gid)
        stack.callback(door.close)
        entry = UnixListener(plan.local_path, plan.gid)
        stack.callback(entry.close)
        local = LocalListener(entry, poller)
        stack.callback(local.close)
        cache = _open_cache(plan.config, clock)
        stack.callback(lambda: cache.close(persist=plan.config.persist))
        growth = Growth(cache.pool, lambda: _nudge(waker))
        stack.callback(growth.stop)
        growth.start()
        core = _core(plan, Ends(tcp, local, door, wake, poller), cache, sessions, counters, supervisor, growth, clock)
        announce()
        core.run()
        log.info("stopping")


def _core(
    plan: Plan,
    ends: Ends,
    cache: Cache,
    sessions: Sessions,
    counters: Counters,
    supervisor: Supervisor,
    growth: Growth,
    clock: SystemClock,
) -> Core:
    config = plan.config
    secret = tenant_secret(state_folder(config.instance), SystemEntropy())
    server_id = SystemEntropy().token(SERVER_ID_BYTES)
    started_at = clock.now()
    welcome = m.Welcome(0, server_id, m.WIRE_VERSION, __version__, config.chunk_tokens, plan.attach_path)

    def attached(instance: Instance) -> m.Attached:
        return m.Attached(
            server=server_id,
            instance=instance.id,
            token=instance.token,
            endpoint=LOCAL_SCHEME + plan.local_path,
            pool_bytes=cache.pool.total_bytes,
            ready_bytes=cache.pool.ready_bytes,
            chunk_tokens=config.chunk_tokens,
            tenant_secret=secret,
        )

    def snapshot() -> bytes:
        frame = report.Frame(__version__, config.chunk_tokens, config.eviction_policy.upper(), clock.now() - started_at)
        engines = [instance for instance in sessions.instances() if instance is not tiering.cascade]
        counters.promotions = tiering.promotions.num_started
        counters.abandoned_promotions = tiering.promotions.num_abandoned
        return report.document(cache.usage(), counters, engines, frame, core.fault or cache.pool.damage())

    tenants = Tenants(secret)
    for salt, limit_gb in LimitsFile(state_folder(config.instance)).load().items():
        tenants.limit(salt, limit_gb)
        cache.quotas.set_limit(tenants.id_of(salt), int(limit_gb * GB))
    tiering = Tiering(cache, sessions, Promotions(clock, SystemEntropy()), clock)
    dispatcher = Dispatcher(cache, sessions, tiering, tenants, counters, welcome, snapshot, log.info)
    core = Core(ends, cache, sessions, dispatcher, tiering, counters, supervisor, growth, clock, attached)
    return core


def _open_cache(config: ServerConfig, clock: SystemClock) -> Cache:
    """The L1 cache, with what an earlier server on this port left if that can be trusted."""
    files = SystemFiles()
    policy = make_policy(config.eviction_policy)
    root, name = default_root(files), config.instance
    directory = pool_directory(root, name)
    for path in sweep_leftovers(root, files, spare=name):
        log.info("removed the pool of a dead server: %s", path)
    before = files.inspect(f"{directory}/{POOL}")
    check_fits(config.l1_bytes, files, reusable_bytes=before.size_bytes if before else 0)
    pool, records = _open_pool(directory, config, files)
    has_tiers = bool(config.tiers) and config.write_policy != "read-only"
    cache = Cache(pool, records, policy, clock, Limits(), entropy=SystemEntropy(), has_tiers=has_tiers)
    num_adopted = cache.usage().num_adopted
    if num_adopted:
        log.info("found %d extents of the server before this one again", num_adopted)
    return cache


def _open_pool(directory: str, config: ServerConfig, files: SystemFiles) -> tuple[Pool, Records]:
    """A server that was killed while it started a process leaves that one with its lock, for a moment."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return open_pool(
                directory, config.l1_bytes, config.chunk_tokens, files, persist=config.persist, note=log.warning
            )
        except PoolBusy:
            if time.monotonic() >= deadline:
                raise
            time.sleep(LOCK_PAUSE_S)


def _bind_port(plan: Plan) -> TcpListener:
    try:
        return TcpListener(plan.rpc_endpoint)
    except AddressInUse:
        raise PortInUse(f"port {plan.config.rpc_port} is in use on {plan.config.host}") from None
    except WireError as error:
        raise ConfigError(str(error)) from None


def _nudge(waker: socket.socket) -> None:
    """Wake the loop from another thread: 0 is no signal's number."""
    with contextlib.suppress(OSError):
        waker.send(b"\0")
