"""Settings of the server, checked once; everything behind them may rely on their bounds."""

from __future__ import annotations

from dataclasses import dataclass

from lmcache.errors import ConfigError
from lmcache_cli.api import HTTP_PORT, RPC_PORT

GB = 1 << 30
"""What this project calls a GB, everywhere."""

L1_BYTES_MIN = 16 << 20
L1_BYTES_MAX = 1 << 50
CHUNK_TOKENS_MAX = 65536
_PORT_MAX = 65535


@dataclass(frozen=True)
class ServerConfig:
    """One server. ``host`` and ``rpc_port`` are the RPC address only; HTTP has its own."""

    host: str = "127.0.0.1"
    rpc_port: int = RPC_PORT
    http_host: str = "127.0.0.1"
    http_port: int = HTTP_PORT
    l1_bytes: int = 4 * GB
    eviction_policy: str = "LRU"
    chunk_tokens: int = 256
    attach_path: str | None = None  # None: derived from the port, see wire/door.py
    attach_group: str | None = None  # a group whose members may attach besides this user
    persist: bool = False  # keep the pool over a clean stop

    def __post_init__(self) -> None:
        """Raises ConfigError with one sentence for the first setting that is out of its bounds."""
        for name, port in (("--port", self.rpc_port), ("--http-port", self.http_port)):
            _check(1 <= port <= _PORT_MAX, f"{name} is 1 to {_PORT_MAX}, not {port}")
        same_host = self.host == self.http_host
        _check(not (same_host and self.rpc_port == self.http_port), "--port and --http-port are the same")
        _check(bool(self.host) and bool(self.http_host), "a host to listen on cannot be empty")
        low, high = L1_BYTES_MIN / GB, L1_BYTES_MAX // GB
        in_bounds = L1_BYTES_MIN <= self.l1_bytes <= L1_BYTES_MAX
        _check(in_bounds, f"--l1-size-gb is {low:g} to {high}, not {self.l1_bytes / GB:g}")
        in_bounds = 1 <= self.chunk_tokens <= CHUNK_TOKENS_MAX
        _check(in_bounds, f"--chunk-size is 1 to {CHUNK_TOKENS_MAX} tokens, not {self.chunk_tokens}")


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)
