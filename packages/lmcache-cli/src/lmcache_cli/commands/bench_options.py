"""What `bench engine` and `bench sweep` share: their flags, where the settings come from, and how they end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click
from click.core import ParameterSource

from lmcache_cli import output, progress, render, target
from lmcache_cli.bench import config, config_file, guide
from lmcache_cli.bench.base import Option
from lmcache_cli.bench.workloads import WORKLOADS
from lmcache_cli.commands.base import ENGINE, KVCACHE, BaseCommand, UrlType
from lmcache_cli.errors import CommandError, ExitStatus, UsageFault
from lmcache_cli.target import Target

SERVER_WAIT_S = 10.0

_GIVEN = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
_TYPES: Mapping[type, Any] = {int: click.INT, float: click.FLOAT, str: click.STRING}
_HELP = {
    "engine_url": "Engine to measure.",
    "workload": "What is sent.",
    "lmcache_url": "LMCache server: its tokens per GB, and its hit counters before and after.",
    "model": "Model to ask; the first that the engine lists where it is left out.",
    "kv_cache_volume": "KV cache to fill, in GB of 2^30 bytes; decides how much some workloads send.",
    "tokens_per_gb_kvcache": "Tokens that fit into one GB; asked from --lmcache-url where it is left out.",
    "seed": "Of all random texts and orders: the same seed sends the same.",
    "ignore_eos": "Let every answer have its full length.",
    "no_warmup": "Measure from the first request on.",
    "concurrency": "Closed loop: so many requests in flight.",
    "request_rate": "Open loop: so many requests per second, however fast the answers come.",
    "arrival": f"Times between requests of the open loop; {config.DEFAULT_ARRIVAL} with --request-rate.",
    "max_duration": "Send nothing after this time; what is in flight is finished.",
    "timeout": "Longest silence of a request before it is given up.",
    "retries": "Send a refused request again, so often; counted and measured from its first sending.",
    "goodput": "Count the requests that keep these limits in ms, as in 'ttft:500 tpot:50' (also itl, e2e).",
}
_METAVARS = {"timeout": "SECONDS", "max_duration": "SECONDS", "kv_cache_volume": "GB", "goodput": "LIMITS"}


class BenchCommand(BaseCommand):
    """A command that measures: `-q` hides progress and never the result, and ctrl-C ends with a result and 130."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for parameter in self.params:
            if isinstance(parameter, click.Option) and parameter.name == "quiet":
                parameter.help = "Show no plan and no progress; the result is printed all the same."

    def invoke(self, ctx: click.Context) -> int:
        """Run the callback, which gets ``quiet``; deliver its report, and return the exit status."""
        form, path = ctx.params.pop("form"), ctx.params.pop("output")
        status: int = ExitStatus.OK
        file = None
        try:
            file = output.OutputFile(path) if path is not None else None
            report: render.Report = click.Command.invoke(self, ctx)
            if report.failure is not None:
                is_interrupted = report.failure.code == "interrupted"
                status = ExitStatus.INTERRUPTED if is_interrupted else ExitStatus.FAILED
        except CommandError as error:
            report, status = self.failure_report(error), error.exit_status
        try:
            if report.width or form == "json":
                output.Sink(form, file, quiet=False).emit(report)
        except CommandError as error:  # --output: the result is on stdout already
            complain(error)
            status = status or error.exit_status
        if report.failure is not None:
            complain(report.failure.message)
        return status


def complain(problem: object) -> None:
    """One line on stderr."""
    print(f"lmcache: {render.one_line(str(problem))}", file=sys.stderr)


@dataclass(frozen=True)
class Asked:
    """The command line of a measuring command.

    Attributes:
        given: settings that were given, on the command line or by environment, by key.
        headers: of `--header`; they and the key go to the engine only.
    """

    given: Mapping[str, Any]
    config_path: str | None
    no_interactive: bool
    output_dir: str
    quiet: bool
    headers: Sequence[str]
    cacert: str | None
    insecure: bool

    def filed(self) -> dict[str, Any]:
        """What the file of `--config` sets; its keys that decide nothing here are named on stderr."""
        if self.config_path is None:
            return {}
        values, unused = config_file.read(self.config_path)
        if unused and not self.quiet:
            complain(f"note: {self.config_path}: not used here: {', '.join(unused)}")
        return values

    def engine(self, settings: config.Config) -> Target:
        """Where to send, and with what.

        Raises:
            UsageFault: a header or the key cannot be sent.
        """
        headers = {**ENGINE.key(), **target.read_headers(self.headers)}
        return Target(settings.engine_url, settings.timeout, headers, self.cacert, self.insecure)

    def server(self, settings: config.Config) -> Target | None:
        """The cache server, if one was named."""
        if settings.lmcache_url is None:
            return None
        return Target(settings.lmcache_url, SERVER_WAIT_S, KVCACHE.key(), self.cacert, self.insecure)


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """All flags of ``config.OPTIONS`` and those of ``Asked``; the callback hands its parameters to ``read``."""
    for workload in reversed(list(WORKLOADS.values())):
        for option in reversed(workload.options):
            function = _flag(option, f"{option.label}, of {workload.name}.")(function)
    others = (
        click.option("--config", "config_path", metavar="FILE", help="Settings of a file; flags win over it."),
        click.option("--no-interactive", is_flag=True, help="Ask nothing; what is missing is an error."),
        click.option("--output-dir", metavar="DIR", default=".", show_default=True, help="Where run folders are made."),
        click.option("--header", metavar="NAME=VALUE|NAME=@FILE", multiple=True, help="Send this too; repeatable."),
        click.option("--cacert", metavar="FILE", help="Authorities (PEM) to trust instead of the system's."),
        click.option("--insecure", is_flag=True, help="Accept any TLS certificate."),
    )
    for decorate in reversed((*(_flag(option, _HELP[option.key]) for option in config.GENERAL), *others)):
        function = decorate(function)
    return function


def read(ctx: click.Context, parameters: Mapping[str, Any]) -> Asked:
    """The command line out of a callback's parameters."""
    given = {key: parameters[key] for key in config.OPTIONS if ctx.get_parameter_source(key) in _GIVEN}
    own = ("config_path", "no_interactive", "output_dir", "quiet", "cacert", "insecure")
    return Asked(given, headers=parameters["header"], **{name: parameters[name] for name in own})


def answered(asked: Asked, *, may_ask: bool) -> guide.Answers:
    """All settings, with the guide's help where some are missing and there is somebody to ask.

    Raises:
        UsageFault: settings are missing or contradict each other.
    """
    filed = asked.filed()
    values = config.resolve(asked.given, filed)
    lacking = config.missing(values)
    if not lacking:
        return guide.Answers(guide.Action.START, values)
    if not may_ask or asked.no_interactive or not is_conversation():
        raise UsageFault(f"missing: {', '.join(lacking)}")
    return guide.Guide(values, _ask, _say, progress.terminal_width()).run()


def is_conversation() -> bool:
    """Whether there is somebody at both ends."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))


def with_folder(report: render.Report, path: os.PathLike[str]) -> render.Report:
    """``report`` and where its files are."""
    entry = render.Entry("run_folder", "Run folder", os.fspath(path))
    return replace(report, sections=[*report.sections, render.Section([entry])])


def _flag(option: Option, help_text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    variables = {"engine_url": ENGINE.variable, "lmcache_url": KVCACHE.variable}
    if option.kind is bool:
        return click.option(option.flag, option.key, is_flag=True, help=help_text)
    kind: Any = _TYPES[option.kind]
    if option.key in variables:
        kind = UrlType()
    elif option.choices:
        kind = click.Choice(option.choices)
    if option.default is not None:
        default = f"{option.default:g}" if isinstance(option.default, float) else option.default
        help_text += f"  [default: {default}]"
    return click.option(
        option.flag,
        option.key,
        type=kind,
        metavar=_METAVARS.get(option.key),
        envvar=variables.get(option.key),
        show_envvar=True,
        help=help_text,
    )


def _ask(prompt: str) -> str | None:
    stream = _talk()
    stream.write(prompt)
    stream.flush()
    line = sys.stdin.readline()
    if not line:
        stream.write("\n")
        return None
    return line.rstrip("\r\n")


def _say(text: str) -> None:
    _talk().write(render.one_line(text) + "\n")


def _talk() -> Any:
    # stdout is for the result; where stderr goes elsewhere, nobody would see a question on it
    return sys.stderr if sys.stderr is not None and sys.stderr.isatty() else sys.stdout
