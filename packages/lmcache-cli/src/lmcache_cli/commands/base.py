"""What every command that reports metrics shares: the output options, the exit status, one document on stdout."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from lmcache_cli import api, output, render, urls
from lmcache_cli.errors import CommandError, ExitStatus, UsageFault

if TYPE_CHECKING:
    ParamType = click.ParamType[str]  # generic only since click 8.4, and only for type checkers
else:
    ParamType = click.ParamType

KVCACHE_URL = f"http://localhost:{api.HTTP_PORT}"
ENGINE_URL = f"http://localhost:{api.ENGINE_PORT}"


class UrlType(ParamType):
    """A server's address, in any spelling of ``urls.base_url``."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The address in normal form; fails with one sentence."""
        try:
            return urls.base_url(value)
        except ValueError as error:
            return self.fail(str(error), param, ctx)


def url_option(default: str, variable: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option `--url` with a default that the environment ``variable`` overrides."""
    shown: dict[str, Any] = {"show_default": True, "show_envvar": True, "help": "Server URL."}
    return click.option("--url", type=UrlType(), default=default, envvar=variable, **shown)


class BaseCommand(click.Command):
    """A command whose callback returns a Report.

    It adds `--format`, `--output` and `--quiet`; prints the report on stdout; prints the reason of a failure as one
    line on stderr and ends with its exit status. A callback may raise any CommandError, or return a report whose
    ``failure`` is set. With `--format json` stdout carries exactly one document in either case (usage errors apart).

    Args:
        title: of the document when the callback raises.
    """

    def __init__(self, *args: Any, title: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._title = title
        self.params += [
            click.Option(
                ["--format", "form"],
                type=click.Choice(render.FORMATS),
                default="terminal",
                show_default=True,
                help="Form of the result.",
            ),
            click.Option(
                ["--output"], metavar="PATH", help="Also save the result to a file, in the form --format names."
            ),
            click.Option(["-q", "--quiet"], is_flag=True, help="Print nothing on stdout."),
        ]

    def invoke(self, ctx: click.Context) -> int:
        """Run the callback, deliver its report, and return the exit status."""
        form, path, quiet = (ctx.params.pop(name) for name in ("form", "output", "quiet"))
        file = output.OutputFile(path) if path is not None else None
        status = ExitStatus.OK
        try:
            report: render.Report = super().invoke(ctx)
            if report.failure is not None:
                status = ExitStatus.FAILED
        except UsageFault:
            raise
        except CommandError as error:
            status = error.exit_status
            report = render.Report(self._title, 0, failure=render.Failure(error.code, str(error)))
        if report.sections or form == "json":
            output.emit(report, form, file, quiet=quiet)
        if report.failure is not None:
            print(f"lmcache: {render.one_line(report.failure.message)}", file=sys.stderr)
        return status


def failed(report: render.Report, error: CommandError) -> render.Report:
    """``report`` with ``error`` as its failure."""
    return replace(report, failure=render.Failure(error.code, str(error)))
