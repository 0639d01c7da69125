"""`lmcache completion SHELL`: the script that makes a shell complete our words."""

from __future__ import annotations

import click
from click import shell_completion


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    For example: source <(lmcache completion bash)
    """
    kind = shell_completion.get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "lmcache", "_LMCACHE_COMPLETE").source())
