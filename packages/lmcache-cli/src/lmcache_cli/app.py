"""Which commands exist, how they are found, and how every ending becomes an exit status.

Adding a command: one new file in ``commands/`` that defines a click command (a command that reports metrics uses
``cls=BaseCommand`` of ``commands.base`` and returns a ``render.Report``), and one line in BUILTIN below. Heavy
imports (httpx) belong inside the command. Another distribution adds a command, without touching this tree, through an
entry point (``plugins``); commands of the full package join that way, and never by a try-import.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import sys
from dataclasses import dataclass

import click

from lmcache_cli import plugins
from lmcache_cli._version import __version__
from lmcache_cli.errors import CommandError, ExitStatus, Interrupted, UsageFault
from lmcache_cli.groups import BareGroup, Group
from lmcache_cli.render import Entry, Failure, Report, Section, one_line, to_json


@dataclass(frozen=True)
class Builtin:
    """Where a command lies (module below ``lmcache_cli.commands``, attribute), and its line in the help."""

    module: str
    attribute: str
    summary: str


BUILTIN = {
    "audit": Builtin("audit", "audit", "Check that no tenant sees or harms another."),
    "auth": Builtin("auth", "auth", "Manage who may use a server's HTTP API."),
    "bench": Builtin("bench", "bench", "Measure a serving engine or a server under load."),
    "completion": Builtin("completion", "completion", "Print the completion script of a shell."),
    "describe": Builtin("describe", "describe", "Show the state of a running service."),
    "kvcache": Builtin("kvcache", "kvcache", "Manage the KV cache of a running LMCache server."),
    "ping": Builtin("ping", "ping", "Check that a server is alive."),
    "query": Builtin("query", "query", "Send one request and report what it took."),
    "quota": Builtin("quota", "quota", "Manage the memory limits of tenants."),
    "verify": Builtin("verify", "verify", "Check that the cache changes no answer."),
}


class Root(Group):
    """The command `lmcache`: built-in commands by table, others by entry point, each imported only when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names for the help."""
        return sorted({*BUILTIN, *plugins.names()})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name, imported now; None when there is none."""
        builtin = BUILTIN.get(cmd_name)
        if builtin is None:
            return plugins.find(cmd_name) if "." not in cmd_name else None
        module = importlib.import_module(f"lmcache_cli.commands.{builtin.module}")
        command: click.Command = getattr(module, builtin.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing any of them."""
        summaries = {name: builtin.summary for name, builtin in BUILTIN.items()} | plugins.RUNTIME
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
        fault = UsageFault(f"{path}: {error.format_message().rstrip('.')}; see '{path} -h'")
        return _complain(words, fault, error.ctx, prefix="")
    except click.ClickException as error:
        return _complain(words, CommandError(error.format_message()), None)
    except CommandError as error:
        return _complain(words, error, None)
    except (click.Abort, KeyboardInterrupt):
        return _interrupted(words)
    except OSError as error:
        _silence_stdout()
        if isinstance(error, BrokenPipeError):
            return ExitStatus.FAILED  # the reader has what it wanted
        print(one_line(f"lmcache: {error.strerror or error}"), file=sys.stderr)
        return ExitStatus.FAILED
    return result if isinstance(result, int) else ExitStatus.OK


def _complain(words: list[str], error: CommandError, ctx: click.Context | None, prefix: str = "lmcache: ") -> int:
    """One line on stderr; and the one document on stdout that `--format json` promises."""
    print(one_line(f"{prefix}{error}"), file=sys.stderr)
    if _asked_for_json(words):
        _write_document(error, ctx)
    return error.exit_status


def _interrupted(words: list[str]) -> int:
    if _asked_for_json(words) and not any(word.split("=")[0] == "--watch" for word in words):
        _write_document(Interrupted("interrupted"), None)
    return ExitStatus.INTERRUPTED


def _write_document(error: CommandError, ctx: click.Context | None) -> None:
    from lmcache_cli.commands.base import BaseCommand  # 10 ms that the help does without

    command = ctx.command if ctx is not None else None
    if isinstance(command, BaseCommand):
        report = command.failure_report(error)
    else:
        failure = Failure(error.code, str(error))
        report = Report("LMCache", 0, [Section([Entry("status", None, "FAIL")])], failure=failure)
    with contextlib.suppress(OSError):
        sys.stdout.write(to_json(report))
        sys.stdout.flush()


def _asked_for_json(words: list[str]) -> bool:
    """Whether the command line asks for JSON on stdout, as far as that can be told of one that cannot be parsed."""
    forms = [b for a, b in itertools.pairwise(words) if a == "--format"]
    forms += [word.removeprefix("--format=") for word in words if word.startswith("--format=")]
    is_silent = bool({"-q", "--quiet"} & set(words)) and words[:1] != ["bench"]  # there it hides progress alone
    return forms[-1:] == ["json"] and not is_silent


def _silence_stdout() -> None:
    """Send what is still buffered nowhere: the interpreter would try, and complain about it, once more when it ends."""
    with contextlib.suppress(OSError, ValueError):
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, sys.stdout.fileno())
        os.close(sink)
