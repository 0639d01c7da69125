"""`lmcache engine`: the options and nothing heavy; joined to the command line by entry-point group lmcache.commands."""

from __future__ import annotations

import click

from lmcache_cli.errors import ExitStatus, UsageFault

WITHOUT = "none"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", metavar="DIR", help="Model directory.  [default: a small random model, made on the spot]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address of the HTTP API.")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True, help="Port of the HTTP API.")
@click.option(
    "--lmcache",
    "address",
    metavar="HOST:PORT",
    default="tcp://127.0.0.1:5555",
    show_default=True,
    help="LMCache server of this machine; `none` = without.",
)
@click.option(
    "--max-model-len",
    type=click.IntRange(min=1),
    metavar="TOKENS",
    help="Longest sequence.  [default: what the model takes]",
)
@click.pass_context
def engine(
    context: click.Context, model: str | None, host: str, port: int, address: str, max_model_len: int | None
) -> None:
    """Serve a model over OpenAI's API, one request after another, with its KV cache kept by an LMCache server.

    For trying things out: a small model on this machine's CPU, no download. Use vLLM for real traffic.
    """
    demand_extra("engine")
    from lmcache.engine import run
    from lmcache.errors import ConfigError, LMCacheError

    try:
        run.serve(model, host, port, None if address == WITHOUT else address, max_model_len)
    except LMCacheError as error:
        click.echo(f"lmcache engine: {error}", err=True)
        context.exit(ExitStatus.USAGE if isinstance(error, ConfigError) else ExitStatus.FAILED)


def demand_extra(command: str) -> None:
    """What the engine needs beyond the full package.

    Raises:
        UsageFault: torch or transformers is not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise UsageFault(
            f"`{command}` needs {' and '.join(missing)}: install this package with its extra, lmcache[engine]"
        )
