"""What every command that reports metrics shares: where to ask, the output options, the exit status, one document."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from lmcache_cli import api, output, render, target, urls
from lmcache_cli.errors import CommandError, ExitStatus, UsageFault

if TYPE_CHECKING:
    ParamType = click.ParamType[str]  # generic only since click 8.4, and only for type checkers
else:
    ParamType = click.ParamType

SECONDS_MAX = 86400.0


class UrlType(ParamType):
    """A server's address, in any spelling of ``urls.base_url``."""

    name = "url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The address in normal form; fails with one sentence."""
        try:
            return urls.base_url(value)
        except ValueError as error:
            return self.fail(str(error), param, ctx)


def seconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Callback of an option that takes seconds: above 0, at most a day."""
    if value is None or (math.isfinite(value) and 0 < value <= SECONDS_MAX):
        return value
    raise click.BadParameter(f"expected seconds above 0 and up to {SECONDS_MAX:g}", ctx, param)


def utf8(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Callback of a text that is sent to a server: what the shell passed on must be UTF-8."""
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise click.BadParameter("it is not UTF-8 text", ctx, param) from error
    return value


@dataclass(frozen=True)
class Service:
    """One kind of server: where it is by default, and what authenticates us to it."""

    url: str
    variable: str
    key: Callable[[], Mapping[str, str]]


KVCACHE = Service(f"http://localhost:{api.HTTP_PORT}", "LMCACHE_URL", target.cache_server_key)
ENGINE = Service(f"http://localhost:{api.ENGINE_PORT}", "LMCACHE_ENGINE_URL", target.engine_key)


def server_options(
    service: Service, flag: str = "--url", timeout_s: float = 10.0
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that describe a server; the callback gets them as one ``target`` of type ``target.Target``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def with_target(
            url: str, timeout: float, header: tuple[str, ...], cacert: str | None, insecure: bool, **others: Any
        ) -> Any:
            headers = {**service.key(), **target.read_headers(header)}
            return function(target=target.Target(url, timeout, headers, cacert, insecure), **others)

        shown: dict[str, Any] = {"show_default": True, "show_envvar": True}
        options = (
            click.option(
                flag, "url", type=UrlType(), default=service.url, envvar=service.variable, help="Server URL.", **shown
            ),
            click.option(
                "--timeout",
                metavar="SECONDS",
                type=float,
                default=timeout_s,
                show_default=True,
                callback=seconds,
                help="Longest wait for an answer.",
            ),
            click.option("--header", metavar="NAME=VALUE|NAME=@FILE", multiple=True, help="Send this too; repeatable."),
            click.option("--cacert", metavar="FILE", help="Authorities (PEM) to trust instead of the system's."),
            click.option("--insecure", is_flag=True, help="Accept any TLS certificate."),
        )
        for option in reversed(options):
            with_target = option(with_target)
        return with_target

    return decorate


class BaseCommand(click.Command):
    """A command whose callback returns a Report.

    It adds `--format`, `--output` and `--quiet`; prints the report on stdout; prints the reason of a failure as one
    line on stderr and ends with its exit status. A callback may raise any CommandError, or return a report whose
    ``failure`` is set. With `--format json` stdout carries exactly one document in either case.

    Args:
        title: of the document when the callback raises.
        keys: of the metrics (dotted paths) that are null then; ``list_names`` are empty lists then.
        watch: whether to offer `--watch SECONDS`.
    """

    def __init__(
        self,
        *args: Any,
        title: str,
        keys: Sequence[str] = (),
        list_names: Sequence[str] = (),
        watch: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._title = title
        self._keys = keys
        self._list_names = list_names
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
        if watch:
            text = "Ask again every so many seconds, until ctrl-C; with json, one object a line."
            self.params.append(click.Option(["--watch"], metavar="SECONDS", type=float, callback=seconds, help=text))

    def invoke(self, ctx: click.Context) -> int:
        """Run the callback, deliver its report, and return the exit status."""
        form, path, quiet = (ctx.params.pop(name) for name in ("form", "output", "quiet"))
        ctx.meta["is_json"] = form == "json" or quiet
        period_s = ctx.params.pop("watch", None)
        try:
            file = output.OutputFile(path) if path is not None else None
        except UsageFault as error:
            return self._deliver(self.failure_report(error), error.exit_status, output.Sink(form, None, quiet))
        if period_s is None:
            return self._once(ctx, output.Sink(form, file, quiet))
        sink = output.Sink(form, file, quiet, is_repeated=True)
        next_s = time.monotonic()
        while True:
            self._once(ctx, sink)
            next_s = max(next_s + period_s, time.monotonic())
            time.sleep(max(0.0, next_s - time.monotonic()))

    def failure_report(self, error: CommandError) -> render.Report:
        """The document of a failure that left nothing to report: every metric is null."""
        entries = [render.Entry("status", None, "FAIL"), *(render.Entry(key, None, None) for key in self._keys)]
        failure = render.Failure(error.code, str(error))
        return render.Report(self._title, 0, [render.Section(entries)], self._list_names, failure)

    def _once(self, ctx: click.Context, sink: output.Sink) -> int:
        try:
            report: render.Report = super().invoke(ctx)
        except CommandError as error:
            return self._deliver(self.failure_report(error), error.exit_status, sink)
        return self._deliver(report, ExitStatus.OK if report.failure is None else ExitStatus.FAILED, sink)

    def _deliver(self, report: render.Report, status: int, sink: output.Sink) -> int:
        has_rows = any(entry.label is not None for section in report.sections for entry in section.entries)
        if has_rows or sink.form == "json":
            sink.emit(report)
        if report.failure is not None:
            print(f"lmcache: {render.one_line(report.failure.message)}", file=sys.stderr)
        return status


def failed(report: render.Report, error: CommandError) -> render.Report:
    """``report`` with ``error`` as its failure."""
    return replace(report, failure=render.Failure(error.code, str(error)))
