"""Groups of commands: without a command they show their help and fail; an unknown command gets the nearest name."""

from __future__ import annotations

import click


class BareGroup(click.UsageError):
    """A group was called without a command; ``message`` is its help."""


class Group(click.Group):
    """A click group with the two habits above, the same in every version of click."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse the bare group."""
        if not args and not ctx.resilient_parsing:
            raise BareGroup(ctx.get_help(), ctx)
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one."""
        name = args[0]
        command = self.get_command(ctx, name)
        if command is not None:
            return name, command, args[1:]
        import difflib

        near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
        hint = f" (did you mean '{near[0]}'?)" if near else ""
        raise click.UsageError(f"no such command '{name}'{hint}", ctx)
