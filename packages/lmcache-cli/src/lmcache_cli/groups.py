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


class OpenGroup(Group):
    """A group that other distributions add commands to (see ``plugins``)."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names for the help."""
        from lmcache_cli import plugins

        return sorted({*super().list_commands(ctx), *plugins.names(self.name or "")})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None when there is none."""
        from lmcache_cli import plugins

        return super().get_command(ctx, cmd_name) or plugins.find(f"{self.name}.{cmd_name}")

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands; those of other distributions are not imported for it."""
        from lmcache_cli import plugins

        rows = []
        for name in self.list_commands(ctx):
            own = self.commands.get(name)
            text = own.get_short_help_str(100) if own else plugins.RUNTIME.get(f"{self.name}.{name}", "(plug-in)")
            rows.append((name, text))
        with formatter.section("Commands"):
            formatter.write_dl(rows)
