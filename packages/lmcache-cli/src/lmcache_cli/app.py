"""Which commands exist, how they are found, and how every ending becomes an exit status.

Adding a command: one new file in ``commands/`` that defines a click command (a command that reports metrics uses
``cls=BaseCommand`` of ``commands.base`` and returns a ``render.Report``), and one line in BUILTIN below. Heavy
imports (httpx) belong inside the command. Another distribution adds a command, without touching this tree, through an
entry point of the group `lmcache.commands`: its name is the command's, its object a click command; it is imported
only when it is used. Commands of the full package (RUNTIME) join that way, and never by a try-import.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from lmcache_cli import _distribution
from lmcache_cli._version import __version__
from lmcache_cli.errors import CommandError, ExitStatus, UsageFault
from lmcache_cli.groups import BareGroup, Group
from lmcache_cli.render import one_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "lmcache.commands"


@dataclass(frozen=True)
class Builtin:
    """Where a command lies (module below ``lmcache_cli.commands``, attribute), and its line in the help."""

    module: str
    attribute: str
    summary: str


BUILTIN = {
    "describe": Builtin("describe", "describe", "Show the state of a running service."),
    "kvcache": Builtin("kvcache", "kvcache", "Manage the KV cache of a running LMCache server."),
    "ping": Builtin("ping", "ping", "Check that a server is alive."),
    "query": Builtin("query", "query", "Send one request and report what it took."),
}

RUNTIME = {"server": "Launch the LMCache server (ZMQ + HTTP). Needs the full package."}


class Root(Group):
    """The command `lmcache`: built-in commands by table, others by entry point, each imported only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names for the help."""
        return sorted({*BUILTIN, *RUNTIME, *_entry_points()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name, imported now; None when there is none."""
        builtin = BUILTIN.get(cmd_name)
        if builtin is not None:
            module = importlib.import_module(f"lmcache_cli.commands.{builtin.module}")
            command: click.Command = getattr(module, builtin.attribute)
            return command
        entry_point = _entry_points().get(cmd_name)
        if entry_point is not None:
            return _load(cmd_name, entry_point)
        if cmd_name in RUNTIME:
            raise UsageFault(
                f"`{cmd_name}` needs the full package: uninstall {_distribution.THIN}, then install the "
                f"{_distribution.FULL} wheel of the same version ({__version__}), or use another environment"
            )
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any of them."""
        summaries = {name: builtin.summary for name, builtin in BUILTIN.items()} | RUNTIME
        rows = [(name, summaries.get(name, "(plug-in)")) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


@click.group(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lmcache", message="%(prog)s %(version)s")
def root() -> None:
    """Talk to LMCache servers and to the engines they serve; run a server.

    Exit status: 0 done; 1 failed, unreachable or unhealthy; 2 wrong usage; 78 conflicting installs; 130 interrupted.
    """


def run(words: list[str]) -> int:
    """Run one command line and return its exit status; errors that a user can cause are one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the locale cannot write is no reason to fail
    try:
        result = root.main(words, prog_name="lmcache", standalone_mode=False)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BareGroup as bare:
        click.echo(bare.message, err=True)
        return ExitStatus.USAGE
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "lmcache"
        return _complain(f"{path}: {error.format_message().rstrip('.')}; see '{path} -h'", ExitStatus.USAGE)
    except click.ClickException as error:
        return _complain(f"lmcache: {error.format_message()}", error.exit_code)
    except CommandError as error:
        return _complain(f"lmcache: {error}", error.exit_status)
    except click.Abort:
        return ExitStatus.INTERRUPTED
    except OSError as error:
        _silence_stdout()
        if isinstance(error, BrokenPipeError):
            return ExitStatus.FAILED  # the reader has what it wanted
        return _complain(f"lmcache: {error.strerror or error}", ExitStatus.FAILED)
    return result if isinstance(result, int) else ExitStatus.OK


def _complain(text: str, status: int) -> int:
    print(one_line(text), file=sys.stderr)
    return status


def _silence_stdout() -> None:
    """Send what is still buffered nowhere: the interpreter would try, and complain about it, once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # 40 ms: only where a name is not built in, and for the help

    return {entry_point.name: entry_point for entry_point in entry_points(group=ENTRY_POINT_GROUP)}


def _load(name: str, entry_point: EntryPoint) -> click.Command:
    try:
        command = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise CommandError(
            f"`{name}` cannot be loaded from {entry_point.value} ({error}); if files of an installed package are "
            "missing, uninstall that package and install it again from its wheel file or a checkout"
        ) from error
    if not isinstance(command, click.Command):
        raise CommandError(f"`{name}` cannot be loaded: {entry_point.value} is not a click command")
    return command
