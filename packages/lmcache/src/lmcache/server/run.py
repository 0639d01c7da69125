"""Puts a server together, runs it, takes it apart again."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import signal
import socket
from collections.abc import Iterator
from dataclasses import asdict

from lmcache.config import GB, ServerConfig
from lmcache.errors import ConfigError, LMCacheError
from lmcache.server import ports, tls
from lmcache.server.access import read_tokens
from lmcache.server.addresses import is_loopback
from lmcache.server.supervisor import Spawned, Supervisor
from lmcache.system import SystemClock, SystemEntropy
from lmcache_cli._version import __version__
from lmcache_cli.api import RPC_PORT

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_FILES_MAX = 65536


def exit_status(error: LMCacheError) -> int:
    """2 for a setting that cannot work, 1 for a machine that does not let us."""
    return 2 if isinstance(error, ConfigError) else 1


def serve(config: ServerConfig, first: Spawned) -> None:
    """Run a server until SIGTERM, SIGINT or SIGHUP. ``first``: its service process, which the caller ends at last.

    Raises:
        LMCacheError: it cannot start; one sentence. ``exit_status`` tells the status to end with.
    """
    level = _log_level()
    logging.basicConfig(level=level, format=LOG_FORMAT)
    _check_tiers(config)
    tokens = read_tokens(config.auth_file, os.environ)
    tls.context(config.tls_cert, config.tls_key)
    _raise_file_limit()
    gid = _group(config.attach_group)
    rpc_endpoint = ports.endpoint(config.host, config.rpc_port)
    with ports.listen(config.http_host, config.http_port) as http_socket, _wake_pair() as (wake, waker):
        from lmcache.wire.door import default_path

        path = os.path.abspath(config.attach_path or default_path(config.rpc_port, gid))
        boot = {
            "endpoint": f"unix://{path}.rpc",
            "version": __version__,
            "config": {**asdict(config), "attach_path": path},
            "tier_names": config.tier_names(),
            "instance": config.instance,
            "tokens": [(token.role, token.digest.hex()) for token in tokens],
            "log_level": level,
            "log_format": LOG_FORMAT,
        }
        supervisor = Supervisor(SystemClock(), SystemEntropy(), http_socket, boot, first)
        supervisor.start()
        try:
            from lmcache.server.assembly import Plan, run_core

            plan = Plan(config, path, gid, rpc_endpoint)
            run_core(plan, supervisor, wake, waker, lambda: _announce(config, has_tokens=bool(tokens)))
        finally:
            supervisor.stop()


def _announce(config: ServerConfig, *, has_tokens: bool) -> None:
    scheme = "https" if config.tls_cert else "http"
    rpc, http = f"tcp://{config.host}:{config.rpc_port}", f"{scheme}://{config.http_host}:{config.http_port}"
    print(
        f"lmcache server {__version__}: RPC {rpc}, HTTP {http}, L1 {config.l1_bytes / GB:g} GB, "
        f"{config.eviction_policy}, chunks of {config.chunk_tokens} tokens"
    )
    command = "vllm serve MODEL --kv-offloading-backend lmcache --kv-offloading-size 1"
    if config.rpc_port != RPC_PORT:
        command = (
            "vllm serve MODEL --kv-transfer-config "
            '\'{"kv_connector":"LMCacheMPConnector","kv_role":"kv_both","kv_connector_extra_config":'
            f'{{"lmcache.mp.host":"tcp://localhost","lmcache.mp.port":{config.rpc_port}}}}}\''
        )
    for name, options in zip(config.tier_names(), config.tiers, strict=True):
        shown = ", ".join(f"{key} {value}" for key, value in options.items() if key != "type")
        print(f"L2 {name}: {shown or 'default options'} ({config.write_policy})")
    if not is_loopback(config.http_host):
        if not has_tokens:
            print("HTTP answers this machine only until there is a token: see lmcache auth init and --auth-file")
        elif not config.tls_cert:
            print("HTTP tokens of other machines travel unencrypted: see --tls-cert and --tls-key")
    print(f"engines of this machine use it with: {command}", flush=True)


def _log_level() -> str:
    level = os.environ.get("LMCACHE_LOG_LEVEL", "INFO").upper()
    if level not in _LEVELS:
        raise ConfigError(f"LMCACHE_LOG_LEVEL is one of {', '.join(_LEVELS)}, not {level!r}")
    return level


def _check_tiers(config: ServerConfig) -> None:
    """Options are judged here, where a wrong one can still end the start; the service process opens the tiers."""
    if config.tiers:
        from lmcache.tiers import make_tier

        for options in config.tiers:
            make_tier(options)


def _raise_file_limit() -> None:
    """Each attached process and each connection takes a descriptor; the usual soft limit of 1024 is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, _FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _group(name: str | None) -> int | None:
    if name is None:
        return None
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ConfigError(f"--attach-group: there is no group {name!r} on this machine") from None


@contextlib.contextmanager
def _wake_pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair of sockets; every signal that we handle writes its number into the second."""
    wake, waker = socket.socketpair()
    with wake, waker:
        wake.setblocking(False)
        waker.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        try:
            yield wake, waker
        finally:
            signal.set_wakeup_fd(-1)
