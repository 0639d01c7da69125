"""`lmcache server`: the options and nothing heavy; joined to the command line by entry-point group lmcache.commands."""

from __future__ import annotations

import click


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the RPC port (not of HTTP).")
@click.option("--port", type=int, default=5555, show_default=True, help="RPC port, for engines of this machine.")
@click.option("--l1-size-gb", type=float, default=4.0, show_default=True, help="Memory for KV; 1 GB = 2^30 bytes.")
@click.option("--eviction-policy", default="LRU", show_default=True, help="What makes room when L1 is full.")
@click.option("--chunk-size", type=int, default=256, show_default=True, help="Tokens in a chunk.")
@click.option("--http-host", default="127.0.0.1", show_default=True, help="Address of the HTTP API.")
@click.option("--http-port", type=int, default=8080, show_default=True, help="Port of the HTTP API.")
@click.option("--attach-path", metavar="PATH", help="Where engines attach.  [default: a private folder of this user]")
@click.option("--attach-group", metavar="NAME", help="Let members of this group attach besides this user.")
@click.option("--l1-persist", is_flag=True, help="Keep L1 over a clean stop, for the next start on this machine.")
@click.option("--instance-id", metavar="NAME", help="What L1 and limits are found again by.  [default: the port]")
@click.option("--l2-path", metavar="DIR", help="Keep KV in this folder too; nothing is written to disk otherwise.")
@click.option("--l2-size-gb", type=float, metavar="N", help="Room that --l2-path may take.")
@click.option(
    "--l2-adapter",
    "l2_adapters",
    multiple=True,
    metavar="JSON",
    help="A tier below L1, or @FILE with its JSON; repeatable.",
)
@click.option(
    "--l2-write-policy",
    default="write-through",
    show_default=True,
    metavar="NAME",
    help="write-through, write-back (when L1 needs the room) or read-only.",
)
@click.option("--auth-file", metavar="PATH", help="Ask HTTP peers for these tokens (see lmcache auth init).")
@click.option("--tls-cert", metavar="FILE", help="Serve HTTP over TLS with this certificate (PEM, with its chain).")
@click.option("--tls-key", metavar="FILE", help="Its private key (PEM), readable by its owner only.")
@click.pass_context
def server(
    context: click.Context,
    host: str,
    port: int,
    l1_size_gb: float,
    eviction_policy: str,
    chunk_size: int,
    http_host: str,
    http_port: int,
    attach_path: str | None,
    attach_group: str | None,
    l1_persist: bool,
    instance_id: str | None,
    l2_path: str | None,
    l2_size_gb: float | None,
    l2_adapters: tuple[str, ...],
    l2_write_policy: str,
    auth_file: str | None,
    tls_cert: str | None,
    tls_key: str | None,
) -> None:
    """Keep the KV cache of engines on this machine and hand it back instead of computing it again."""
    from lmcache.server.supervisor import spawn

    first = spawn()  # ahead of everything else, because its imports take longest
    from lmcache.config import GB, ServerConfig
    from lmcache.errors import LMCacheError
    from lmcache.server import run
    from lmcache.server.tier_options import read_tiers

    try:
        config = ServerConfig(
            host=host,
            rpc_port=port,
            http_host=http_host,
            http_port=http_port,
            l1_bytes=int(l1_size_gb * GB) if abs(l1_size_gb) < 1e9 else 0,  # 0: out of bounds, as nan is
            eviction_policy=eviction_policy,
            chunk_tokens=chunk_size,
            attach_path=attach_path,
            attach_group=attach_group,
            persist=l1_persist,
            instance_id=instance_id,
            tiers=read_tiers(l2_path, l2_size_gb, l2_adapters),
            write_policy=l2_write_policy,
            auth_file=auth_file,
            tls_cert=tls_cert,
            tls_key=tls_key,
        )
        run.serve(config, first)
    except LMCacheError as error:
        click.echo(f"lmcache server: {error}", err=True)
        context.exit(run.exit_status(error))
    finally:
        first.end()
