"""`lmcache verify engine`: greedy answers with the cache and without, compared."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from lmcache_cli.commands.base import ENGINE, KVCACHE, BaseCommand, UrlType, failed, server_options, utf8
from lmcache_cli.errors import CommandError, ServerError, UsageFault
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

if TYPE_CHECKING:
    from lmcache_cli.verify.compare import Comparison
    from lmcache_cli.verify.evidence import Served
    from lmcache_cli.verify.greedy import GreedyEngine
    from lmcache_cli.verify.run import Narrowed, Row

TITLE = "Verify Engine"
WIDTH = 72
PROMPTS_MAX = 1000
LENGTHS = ((1, 1), (2, 0), (3, 97), (5, 33), (8, 8))
"""Of the default prompts: (chunks, tokens more, of 256ths of a chunk)."""

COUNTS = ("num_compared", "num_equal", "num_close", "num_diverged", "num_not_cached", "num_inconclusive")
KEYS = (
    *("engine_url", "lmcache_url", "model", "chunk_size", "max_tokens", "logprob_tolerance", "num_prompts"),
    *(*COUNTS, "divergence_rate", "logprob_difference_max"),
)


class NothingCompared(CommandError):
    """No prompt was served from the cache, or none could be computed for comparison."""

    code = "not_compared"


class Diverged(CommandError):
    """An answer from the cache is another one."""

    code = "diverged"


@dataclass(frozen=True)
class Setting:
    """What is asked, and where."""

    engine_url: str
    lmcache_url: str
    model: str
    chunk_size: int
    max_tokens: int
    tolerance: float
    num_prompts: int


def _tolerance(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if math.isfinite(value) and value >= 0:
        return value
    raise click.BadParameter("expected a number, 0 or more", ctx, param)


@click.command("engine", cls=BaseCommand, title=TITLE, keys=KEYS, list_names=("prompts",))
@server_options(ENGINE, "--engine-url", timeout_s=120.0)
@click.option(
    "--lmcache-url",
    type=UrlType(),
    default=KVCACHE.url,
    envvar=KVCACHE.variable,
    show_default=True,
    show_envvar=True,
    help="LMCache server that the engine stores into; --header is not sent there.",
)
@click.option(
    "--prompt",
    "texts",
    metavar="TEXT|-|@FILE",
    multiple=True,
    help="Prompt, at least a chunk long; repeatable. {NAME} as in query engine.  [default: five of random words]",
)
@click.option("--documents", metavar="NAME=PATH", multiple=True, help="File that {NAME} inserts; repeatable.")
@click.option("--model", metavar="ID", callback=utf8, help="Model to ask.  [default: the first that the engine lists]")
@click.option("--max-tokens", type=click.IntRange(1, 4096), default=32, show_default=True, help="Tokens to generate.")
@click.option("--seed", type=int, default=42, show_default=True, help="Of the random words.")
@click.option(
    "--logprob-tolerance",
    metavar="NATS",
    type=float,
    default=0.1,
    show_default=True,
    callback=_tolerance,
    help="Difference of log probabilities that rounding may make.",
)
@click.option(
    "--reset-prefix-cache",
    is_flag=True,
    help="Empty the engine's own prefix cache before each cached request (vLLM with VLLM_SERVER_DEV_MODE=1).",
)
def verify_engine(
    target: Target,
    lmcache_url: str,
    texts: tuple[str, ...],
    documents: tuple[str, ...],
    model: str | None,
    max_tokens: int,
    seed: int,
    logprob_tolerance: float,
    reset_prefix_cache: bool,
) -> Report:
    """Compare an engine's greedy answers from the cache with computed ones.

    Each prompt is computed twice, stored and asked again; a cache_salt of its own makes a request miss. Where an
    answer differs, the first chunk that makes the difference is found, and its tier. Best on an engine that is idle.

    Exit status 1: an answer differs (`diverged`), or the cache served none that could be compared (`not_compared`).
    """
    from lmcache_cli.client import CacheServer
    from lmcache_cli.verify.evidence import Holdings, Witness
    from lmcache_cli.verify.greedy import GreedyEngine
    from lmcache_cli.verify.run import Verifier

    if len(texts) > PROMPTS_MAX:
        raise UsageFault(f"at most {PROMPTS_MAX} prompts")
    expanded = _expanded(texts, documents)
    server_target = Target(lmcache_url, target.timeout_s, KVCACHE.key(), target.cacert, target.insecure)
    rows: list[Row] = []
    with GreedyEngine(target) as engine, CacheServer(server_target) as server:
        holdings = Holdings(server, lmcache_url)
        chunk_size = holdings.chunk_size()
        model = engine.first_model() if model is None else model
        if expanded:
            prompts = [engine.tokenize(model, text, add_special_tokens=True).tokens for text in expanded]
        else:
            prompts = default_prompts(engine, model, seed, chunk_size, max_tokens)
        setting = Setting(target.url, lmcache_url, model, chunk_size, max_tokens, logprob_tolerance, len(prompts))
        verifier = Verifier(
            *(engine, holdings, Witness(engine, server), model),
            *(max_tokens, logprob_tolerance, chunk_size, reset_prefix_cache),
        )
        try:
            for prompt in prompts:
                rows.append(verifier.verify(prompt))
        except ServerError as error:
            if not rows:
                raise
            return failed(verification_report(setting, rows, is_failed=True), error)  # what was found is not lost
    return _judged(setting, rows)


def _expanded(texts: Sequence[str], documents: Sequence[str]) -> list[str]:
    from lmcache_cli import prompts

    if documents and not texts:
        raise UsageFault("--documents needs a --prompt with a placeholder")
    found = [prompts.expand(prompts.read(text), documents) for text in texts]
    try:
        "".join(found).encode()
    except UnicodeEncodeError as error:
        raise UsageFault("--prompt: it is not UTF-8 text") from error
    return found


def default_prompts(engine: GreedyEngine, model: str, seed: int, chunk_size: int, max_tokens: int) -> list[list[int]]:
    """Token ids of random words, in lengths around whole numbers of chunks, as far as the model takes them.

    Raises:
        CommandError: the model takes no prompt of a chunk.
    """
    from lmcache_cli.bench.texts import TokenizedTexts

    most = next((each.max_model_len for each in engine.served() if each.name == model), None)
    room = (1 << 62) if most is None else most - max_tokens
    lengths = [chunks * chunk_size + more * chunk_size // 256 for chunks, more in LENGTHS]
    lengths = [length for length in lengths if length <= room]
    if not lengths:
        raise CommandError(
            f"{model} takes {most} tokens: too few for a chunk of {chunk_size} and {max_tokens} answered"
        )
    words = TokenizedTexts(seed, lambda text: engine.tokenize(model, text).count)
    prompts = []
    for number, length in enumerate(lengths):
        tokens: list[int] = []
        for spare in (16, length):
            text = words.words(length + spare, "verify", number)
            tokens = engine.tokenize(model, text, add_special_tokens=True).tokens[:length]
            if len(tokens) == length:
                break
        prompts.append(tokens)
    return prompts


def _judged(setting: Setting, rows: Sequence[Row]) -> Report:
    """The report, with its failure where an answer differs or none could be compared."""
    from lmcache_cli.verify.run import COMPARED, DIVERGED

    num_compared = sum(row.verdict in COMPARED for row in rows)
    diverged = [row for row in rows if row.verdict == DIVERGED]
    if diverged:
        narrowed = next((row.narrowed for row in diverged if row.narrowed and row.narrowed.chunk is not None), None)
        where = (
            "" if narrowed is None else f"; the first difference comes with chunk {narrowed.chunk} ({narrowed.tier})"
        )
        error: CommandError = Diverged(
            f"{len(diverged)} of {num_compared} prompts are answered otherwise from the cache{where}"
        )
    elif not num_compared:
        reason = rows[0].reason if len({row.reason for row in rows}) == 1 else None
        error = NothingCompared("nothing could be compared" + (f": {reason}" if reason else ", see the rows"))
    else:
        return verification_report(setting, rows)
    return failed(verification_report(setting, rows, is_failed=True), error)


def verification_report(setting: Setting, rows: Sequence[Row], is_failed: bool = False) -> Report:
    """The report on the prompts that were tried."""
    from lmcache_cli.verify.run import COMPARED, VERDICTS

    counts = collections.Counter(row.verdict for row in rows)
    num_compared = sum(counts[verdict] for verdict in COMPARED)
    rate = counts["diverged"] / num_compared if num_compared else None
    differences = [
        row.comparison.logprob_difference
        for row in rows
        if row.comparison is not None and row.verdict in COMPARED and row.comparison.logprob_difference is not None
    ]
    overview = [
        Entry("status", "Status", "FAIL" if is_failed else "OK"),
        Entry("engine_url", "Engine", setting.engine_url),
        Entry("lmcache_url", "LMCache server", setting.lmcache_url),
        Entry("model", "Model", setting.model),
        Entry("chunk_size", "Chunk size", setting.chunk_size),
        Entry("max_tokens", "Tokens of an answer", setting.max_tokens),
        Entry("logprob_tolerance", "Tolerance (log probability)", setting.tolerance, text=f"{setting.tolerance:g}"),
        Entry("num_prompts", "Prompts", setting.num_prompts),
        Entry("num_compared", "Compared", num_compared),
        *(Entry(f"num_{verdict}", _LABELS[verdict], counts[verdict]) for verdict in VERDICTS),
        Entry("divergence_rate", "Divergence rate", rate, text=None if rate is None else f"{rate:.1%}"),
        Entry(
            "logprob_difference_max",
            "Largest difference of first tokens (log probability)",
            max(differences, default=None),
            text=f"{max(differences):.2g}" if differences else None,
        ),
    ]
    sections = [Section(overview), *(_row(number, row) for number, row in enumerate(rows, 1))]
    return Report(TITLE, WIDTH, sections, list_names=("prompts",))


_LABELS = {
    "equal": "- equal",
    "close": "- equal but for a tie",
    "diverged": "- diverged",
    "not_cached": "Not served from the cache",
    "inconclusive": "Inconclusive",
}


def _row(number: int, row: Row) -> Section:
    held = collections.Counter(tier for tier in row.tiers if tier is not None)
    places = ", ".join(f"{count} in {tier}" for tier, count in sorted(held.items()))
    served = row.served
    entries = [
        Entry("verdict", "Verdict", row.verdict),
        Entry("reason", "Reason" if row.reason else None, row.reason),
        Entry("prompt_tokens", "Tokens", row.num_tokens),
        Entry(
            "is_deterministic",
            "Computed twice" if row.is_deterministic is False else None,
            row.is_deterministic,
            text="the answers differ" if row.is_deterministic is False else None,
        ),
        Entry("num_chunks_by_tier", "Chunks held" if row.tiers else None, dict(held), text=places or "none"),
        Entry("cached_tokens", "Cached tokens" if served else None, row.cached_tokens),
        Entry("source", "Served by" if served else None, served and served.source, text=_source(served)),
        Entry("lmcache_tokens", "Of these from LMCache" if served else None, served and served.lmcache_tokens),
        Entry("told_by", None, served and served.told_by),
        Entry("quarantined_chunks", None, served and served.quarantined),
        *_difference(row.comparison),
        *_narrowed(row.narrowed),
    ]
    return Section(entries, label=f"Prompt {number}", list_name="prompts")


def _source(served: Served | None) -> str | None:
    return None if served is None else f"{served.source} (by the {served.told_by})"


def _difference(comparison: Comparison | None) -> list[Entry]:
    logprob = comparison and comparison.logprob_difference
    position = comparison and comparison.position
    shown = None if comparison is None or position is None else f"{comparison.expected!r} became {comparison.got!r}"
    return [
        Entry(
            "logprob_difference",
            None if logprob is None else "Difference of the first token",
            logprob,
            text=None if logprob is None else f"{logprob:.2g}",
        ),
        Entry("difference.position", None if position is None else "First difference at token", position),
        Entry("difference.expected", None, comparison and comparison.expected),
        Entry("difference.got", None if shown is None else "There", comparison and comparison.got, text=shown),
    ]


def _narrowed(found: Narrowed | None) -> list[Entry]:
    again = {None: None, True: "differs too", False: "is answered right"}
    is_shown = found is not None and found.chunk is not None
    return [
        Entry("first_bad_chunk", "First chunk that changes it" if is_shown else None, found and found.chunk),
        Entry("first_bad_tier", "Tier of that chunk" if is_shown else None, found and found.tier),
        Entry(
            "is_stored_again_bad",
            "Stored anew, the prompt" if is_shown else None,
            found and found.is_stored_again_bad,
            text=again[found.is_stored_again_bad] if found else None,
        ),
        Entry("narrowing_reason", "No chunk found" if found and found.reason else None, found and found.reason),
        Entry("narrowing_requests", None, found and found.num_requests),
    ]
