"""`lmcache query engine|kvcache`: one request, measured; one look-up."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lmcache_cli.commands.base import ENGINE, BaseCommand, failed, server_options, utf8
from lmcache_cli.commands.query_kvcache import query_kvcache
from lmcache_cli.errors import ServerError
from lmcache_cli.groups import Group
from lmcache_cli.render import Entry, Report, Section, one_line
from lmcache_cli.target import Target

if TYPE_CHECKING:
    from lmcache_cli.measured import Completion

TITLE = "Query Engine"
WIDTH = 48
REPEAT_MAX = 1000
LATENCY_KEYS = (
    *("latency.output_tokens", "latency.ttft_ms", "latency.tpot_ms_per_token", "latency.total_latency_ms"),
    "latency.throughput_tokens_per_s",
)
KEYS = ("model", "prompt_tokens", "cached_tokens", *LATENCY_KEYS, "answer")


@click.group(cls=Group)
def query() -> None:
    """Send one request and report what it took."""


query.add_command(query_kvcache)


@query.command("engine", cls=BaseCommand, title=TITLE, keys=KEYS)
@server_options(ENGINE, timeout_s=30.0)
@click.option(
    "--prompt",
    required=True,
    metavar="TEXT|-|@FILE",
    callback=utf8,
    help="Prompt; - reads it from stdin. {lmcache} inserts a text on LMCache, {NAME} a document; @@ is a literal @.",
)
@click.option("--model", metavar="ID", callback=utf8, help="Model to ask.  [default: the first that the engine lists]")
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True, help="Tokens to generate.")
@click.option("--documents", metavar="NAME=PATH", multiple=True, help="File that {NAME} inserts; repeatable.")
@click.option("--completions", "endpoint", flag_value="completions", help="Only /v1/completions.")
@click.option("--chat", "endpoint", flag_value="chat", help="Only /v1/chat/completions.")
@click.option("--show-answer", is_flag=True, help="Print the answer as it arrives, before the report.")
@click.option(
    "--repeat",
    metavar="N",
    type=click.IntRange(1, REPEAT_MAX),
    default=1,
    show_default=True,
    help="Send it N times, and show the first (cold) against the median of the others (warm).",
)
@click.pass_context
def query_engine(
    ctx: click.Context,
    target: Target,
    prompt: str,
    model: str | None,
    max_tokens: int,
    documents: tuple[str, ...],
    endpoint: str | None,
    show_answer: bool,
    repeat: int,
) -> Report:
    """Send a prompt to a serving engine's OpenAI API; report tokens, latency and throughput.

    TTFT is the time to the first text (reasoning counts), TPOT (last - first text) / (tokens - 1), N/A below two
    tokens; throughput is 1000 / TPOT. The sample in the reference divides by all tokens instead. Token counts are the
    engine's. The key in OPENAI_API_KEY is sent when set.
    """
    from lmcache_cli import measured, prompts
    from lmcache_cli.client import Engine

    text = prompts.expand(prompts.read(prompt), documents)
    listener = _print_piece if show_answer and not ctx.meta.get("is_json") else None
    runs = []
    with Engine(target) as engine:
        model = engine.first_model() if model is None else model
        for _ in range(repeat):
            try:
                runs.append(measured.complete(engine, model, text, max_tokens, endpoint, listener))
            except ServerError as error:
                if not runs:
                    raise
                return failed(completion_report(runs, is_failed=True), error)  # what was measured is not lost
            if listener is not None:
                sys.stdout.write("\n")
    return completion_report(runs)


def completion_report(runs: Sequence[Completion], is_failed: bool = False) -> Report:
    """The report on one completion, or on several of the same prompt: the first against the median of the others.

    Args:
        is_failed: whether a later run failed.
    """
    first = runs[0]
    request = [
        *([Entry("status", "Status", "FAIL")] if is_failed else []),
        Entry("model", "Model", first.model),
        Entry("prompt_tokens", "Input tokens", first.prompt_tokens),
        Entry("cached_tokens", None if first.cached_tokens is None else "Cached tokens", first.cached_tokens),
    ]
    sections = [Section(request), Section(_latency(first), label="Latency Metrics")]
    sections.append(Section([Entry("answer", None, first.answer)]))
    if len(runs) > 1 or is_failed:
        sections.append(_cold_and_warm(first, runs[1:]))
        sections += [Section([*_run(done)], list_name="runs") for done in runs]
    return Report(TITLE, WIDTH, sections)


def _latency(done: Completion) -> list[Entry]:
    return [
        Entry("latency.output_tokens", "Output tokens", done.output_tokens),
        Entry("latency.ttft_ms", "TTFT (ms)", _ms(done.ttft_s)),
        Entry("latency.tpot_ms_per_token", "TPOT (ms/token)", _rounded(done.tpot_ms)),
        Entry("latency.total_latency_ms", "Total latency (ms)", _ms(done.total_s)),
        Entry("latency.throughput_tokens_per_s", "Throughput (tokens/s)", _rounded(done.throughput_tokens_per_s)),
    ]


def _cold_and_warm(cold: Completion, warm: Sequence[Completion]) -> Section:
    ttft_ms = [done.ttft_s * 1e3 for done in warm if done.ttft_s is not None]
    warm_ms = statistics.median(ttft_ms) if ttft_ms else None
    cold_ms = _ms(cold.ttft_s)
    cached = [done.cached_tokens for done in warm if done.cached_tokens is not None]
    entries = [
        Entry("repeat.num_runs", "Runs", 1 + len(warm)),
        Entry("repeat.cold_ttft_ms", "TTFT, first (ms)", cold_ms),
        Entry("repeat.warm_ttft_ms", "TTFT, others, median (ms)", _rounded(warm_ms)),
        Entry("repeat.speedup", "First / others", _rounded(cold_ms / warm_ms) if cold_ms and warm_ms else None),
        Entry("repeat.warm_cached_tokens", "Cached tokens, others", statistics.median(cached) if cached else None),
    ]
    return Section(entries, label="Repeated")


def _run(done: Completion) -> list[Entry]:
    latency = [Entry(entry.key.removeprefix("latency."), None, entry.value) for entry in _latency(done)]
    return [Entry("cached_tokens", None, done.cached_tokens), *latency]


def _print_piece(text: str) -> None:
    sys.stdout.write("\n".join(map(one_line, text.split("\n"))))
    sys.stdout.flush()


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 2)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
