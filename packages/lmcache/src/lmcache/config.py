"""Settings of the server, checked once; everything behind them may rely on their bounds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmcache.errors import ConfigError
from lmcache_cli.api import HTTP_PORT, RPC_PORT

GB = 1 << 30
"""What this project calls a GB, everywhere."""

L1_BYTES_MIN = 16 << 20
L1_BYTES_MAX = 1 << 50
CHUNK_TOKENS_MAX = 65536
TIERS_MAX = 8
WRITE_POLICIES = ("write-through", "write-back", "read-only")
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
    instance_id: str | None = None  # what L1 and limits are kept under; None: the RPC port
    tiers: tuple[Mapping[str, object], ...] = ()  # options of each adapter, uppermost first; no secrets
    write_policy: str = WRITE_POLICIES[0]
    auth_file: str | None = None  # digests of the tokens that HTTP asks for
    tls_cert: str | None = None  # HTTP speaks TLS with this certificate, and
    tls_key: str | None = None  # this key

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
        _check(len(self.tiers) <= TIERS_MAX, f"at most {TIERS_MAX} tiers, not {len(self.tiers)}")
        _check((self.tls_cert is None) == (self.tls_key is None), "--tls-cert and --tls-key go together")
        known = ", ".join(WRITE_POLICIES)
        _check(self.write_policy in WRITE_POLICIES, f"--l2-write-policy is one of {known}, not {self.write_policy!r}")

    @property
    def instance(self) -> str:
        """The name that this server's L1 and limits are found again by."""
        return self.instance_id or str(self.rpc_port)

    def tier_names(self) -> list[str]:
        """A name for each tier: its type, and a number where there are several of that type."""
        types = [str(options.get("type", "")) for options in self.tiers]
        return [
            name if types.index(name) == position else f"{name}-{types[: position + 1].count(name)}"
            for position, name in enumerate(types)
        ]


def _check(holds: bool, sentence: str) -> None:
    if not holds:
        raise ConfigError(sentence)
