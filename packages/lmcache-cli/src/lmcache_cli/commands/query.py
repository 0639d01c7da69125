"""`lmcache query engine`: one request to a serving engine, measured."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import click

from lmcache_cli.commands.base import ENGINE_URL, BaseCommand, url_option
from lmcache_cli.errors import BadAnswer
from lmcache_cli.groups import Group
from lmcache_cli.render import Entry, Report, Section

if TYPE_CHECKING:
    from lmcache_cli.completion import Completion

TITLE = "Query Engine"
WIDTH = 48
TIMEOUT_S_MAX = 86400.0


@click.group(cls=Group)
def query() -> None:
    """Send one request and report what it took."""


def _timeout(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if math.isfinite(value) and 0 < value <= TIMEOUT_S_MAX:
        return value
    raise click.BadParameter(f"expected seconds above 0 and up to {TIMEOUT_S_MAX:g}", ctx, param)


@query.command("engine", cls=BaseCommand, title=TITLE)
@url_option(ENGINE_URL, "LMCACHE_ENGINE_URL")
@click.option("--prompt", required=True, help="Prompt; {lmcache} inserts a text on LMCache, {NAME} a document.")
@click.option("--model", metavar="ID", help="Model to ask.  [default: the first that the engine lists]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate.")
@click.option(
    "--timeout",
    type=float,
    default=30.0,
    show_default=True,
    callback=_timeout,
    help="Seconds to bear the engine's silence.",
)
@click.option("--documents", metavar="NAME=PATH", multiple=True, help="File that {NAME} inserts; repeatable.")
def query_engine(
    url: str, prompt: str, model: str | None, max_tokens: int, timeout: float, documents: tuple[str, ...]
) -> Report:
    """Send a prompt to a serving engine's OpenAI API; report tokens, latency and throughput.

    The key in OPENAI_API_KEY is sent when set.
    """
    from lmcache_cli import completion, prompts
    from lmcache_cli.client import Engine

    text = prompts.expand(prompt, documents)
    with Engine(url, timeout) as engine:
        if model is None:
            models = engine.models()
            if not models:
                raise BadAnswer(f"{url} lists no models; name one with --model")
            model = models[0]
        return completion_report(completion.complete(engine, model, text, max_tokens))


def completion_report(done: Completion) -> Report:
    """The report on one completion."""
    request = [
        Entry("model", "Model", done.model),
        Entry("prompt_tokens", "Input tokens", done.prompt_tokens),
    ]
    if done.cached_tokens is not None:
        request.append(Entry("cached_tokens", None, done.cached_tokens))
    latency = [
        Entry("output_tokens", "Output tokens", done.output_tokens),
        Entry("latency.ttft_ms", "TTFT (ms)", _ms(done.ttft_s)),
        Entry("latency.tpot_ms_per_token", "TPOT (ms/token)", _rounded(done.tpot_ms)),
        Entry("latency.total_latency_ms", "Total latency (ms)", _ms(done.total_s)),
        Entry("latency.throughput_tokens_per_s", "Throughput (tokens/s)", _rounded(done.throughput_tokens_per_s)),
    ]
    return Report(TITLE, WIDTH, [Section(request), Section(latency, label="Latency Metrics")])


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 2)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
