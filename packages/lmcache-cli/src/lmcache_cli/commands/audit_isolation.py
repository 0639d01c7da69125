"""`lmcache audit isolation`: tenants of a live server, one against the other."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from lmcache_cli.commands.base import ENGINE, KVCACHE, BaseCommand, UrlType, failed, server_options, utf8
from lmcache_cli.commands.query_kvcache import read_token_ids
from lmcache_cli.errors import CommandError, ServerError, UsageFault
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

if TYPE_CHECKING:
    from lmcache_cli.audit.tenants import Check, Tenants
    from lmcache_cli.client import CacheServer
    from lmcache_cli.verify.evidence import Holdings
    from lmcache_cli.verify.greedy import GreedyEngine

TITLE = "Audit Isolation"
WIDTH = 72
PROMPT_CHUNKS = 4
KEYS = ("lmcache_url", "engine_url", "model", "chunk_size", "prompt_tokens", "num_passed", "num_failed", "num_not_run")


class NotIsolated(CommandError):
    """A tenant sees, harms or feels another."""

    code = "not_isolated"


class NothingAudited(CommandError):
    """No check could be made, or none to its end."""

    code = "not_audited"


@click.command("isolation", cls=BaseCommand, title=TITLE, keys=KEYS, list_names=("checks",))
@server_options(KVCACHE, "--lmcache-url", timeout_s=60.0)
@click.option(
    "--engine-url",
    type=UrlType(),
    envvar=ENGINE.variable,
    show_envvar=True,
    help="Engine that stores into the server; --header is not sent there. Without it, only look-ups are made.",
)
@click.option("--model", metavar="ID", callback=utf8, help="Model to ask.  [default: the first that the engine lists]")
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    help=f"Tokens of a prompt.  [default: {PROMPT_CHUNKS} chunks and one]",
)
@click.option(
    "--samples", type=click.IntRange(20, 10_000), default=30, show_default=True, help="Times taken of each kind."
)
@click.option("--token-ids", metavar="IDS|@FILE", help="Without an engine: tokens that the server holds for a tenant.")
@click.option("--cache-salt", metavar="SALT", callback=utf8, help="Without an engine: the salt of that tenant.")
def audit_isolation(
    target: Target,
    engine_url: str | None,
    model: str | None,
    prompt_tokens: int | None,
    samples: int,
    token_ids: str | None,
    cache_salt: str | None,
) -> Report:
    """Check on a live server that the same cache salt hits, another misses, evicts nothing, and feels nothing.

    The tenants have random names, and the limit that one of them gets is removed again. What was stored ages out.

    Exit status 1: a check failed (`not_isolated`), or none passed (`not_audited`).
    """
    from lmcache_cli.client import CacheServer
    from lmcache_cli.verify.evidence import Holdings
    from lmcache_cli.verify.greedy import GreedyEngine

    if engine_url is not None and token_ids is not None:
        raise UsageFault("--token-ids is for an audit without --engine-url")
    if (token_ids is None) != (cache_salt is None):
        raise UsageFault("--token-ids and --cache-salt belong together")
    if engine_url is None:
        tokens = None if token_ids is None else read_token_ids(token_ids)
        with CacheServer(target) as server:
            return _by_look_up(Holdings(server, target.url), target.url, tokens, cache_salt or "")
    engine_target = Target(engine_url, target.timeout_s, ENGINE.key(), target.cacert, target.insecure)
    with CacheServer(target) as server, GreedyEngine(engine_target) as engine:
        holdings = Holdings(server, target.url)
        return _through_engine(engine, server, holdings, target.url, engine_url, model, prompt_tokens, samples)


def _by_look_up(holdings: Holdings, url: str, tokens: Sequence[int] | None, salt: str) -> Report:
    """What can be checked where nothing can be stored."""
    from lmcache_cli.audit import tenants as kinds

    chunk_size = holdings.chunk_size()
    needs = "storing needs an engine: give --engine-url"
    if tokens is None:
        reason = f"{needs}, or --token-ids and --cache-salt of something that is held"
        checks = [kinds.Check(name, kinds.NOT_RUN, reason) for name in (kinds.SAME_SALT, kinds.OTHER_SALT)]
    elif len(tokens) < chunk_size:
        raise UsageFault(f"--token-ids: {len(tokens)} tokens are less than a chunk of {chunk_size}")
    else:
        checks = [kinds.look_up_same(holdings, tokens, salt), kinds.look_up_others(holdings, tokens, salt)]
    checks += [kinds.Check(name, kinds.NOT_RUN, needs) for name in (kinds.EVICTION, kinds.TIMING)]
    return _judged(audit_overview(url, None, None, chunk_size, None if tokens is None else len(tokens)), checks)


def _through_engine(
    engine: GreedyEngine,
    server: CacheServer,
    holdings: Holdings,
    url: str,
    engine_url: str,
    model: str | None,
    prompt_tokens: int | None,
    num_samples: int,
) -> Report:
    from lmcache_cli.audit import timing
    from lmcache_cli.audit.tenants import FAIL, NAMES, NOT_RUN, Check, Tenants

    chunk_size = holdings.chunk_size()
    model = engine.first_model() if model is None else model
    num_tokens = prompt_tokens or PROMPT_CHUNKS * chunk_size + 1
    if num_tokens < chunk_size:
        raise UsageFault(f"--prompt-tokens: a chunk of this server has {chunk_size}")
    overview = audit_overview(url, engine_url, model, chunk_size, num_tokens)
    tenants = Tenants(engine, server, holdings, model, chunk_size, num_tokens)
    steps: Sequence[Callable[[Tenants], Check]] = (
        Tenants.same_salt,
        Tenants.other_salt,
        Tenants.eviction,
        lambda all_: timing.check(all_, num_samples),
    )
    checks: list[Check] = []
    for step in steps:
        try:
            checks.append(step(tenants))
        except ServerError as error:
            if not checks:
                raise
            checks += [Check(name, NOT_RUN, "an earlier check broke off") for name in NAMES[len(checks) :]]
            return failed(audit_report(overview, checks, is_failed=True), error)  # what was found is not lost
        if len(checks) == 1 and checks[0].result == FAIL:
            checks += [Check(name, NOT_RUN, "a cache that never hits keeps nobody apart") for name in NAMES[1:]]
            break
    return _judged(overview, checks)


def _judged(overview: Sequence[Entry], checks: Sequence[Check]) -> Report:
    bad = [check for check in checks if check.result == "fail"]
    if bad:
        error: CommandError = NotIsolated("; ".join(f"{check.name}: {check.detail}" for check in bad))
    elif not any(check.result == "pass" for check in checks):
        error = NothingAudited(f"no check could be made: {checks[0].detail}")
    else:
        return audit_report(overview, checks)
    return failed(audit_report(overview, checks, is_failed=True), error)


def audit_overview(
    url: str, engine_url: str | None, model: str | None, chunk_size: int, num_tokens: int | None
) -> list[Entry]:
    """What was audited, and through what."""
    return [
        Entry("lmcache_url", "LMCache server", url),
        Entry("engine_url", "Engine", engine_url),
        Entry("model", "Model" if engine_url else None, model),
        Entry("chunk_size", "Chunk size", chunk_size),
        Entry("prompt_tokens", "Tokens of a prompt", num_tokens),
    ]


def audit_report(overview: Sequence[Entry], checks: Sequence[Check], is_failed: bool = False) -> Report:
    """The report on the checks."""
    counts = collections.Counter(check.result for check in checks)
    summary = [
        Entry("status", "Status", "FAIL" if is_failed else "OK"),
        *overview,
        Entry("num_passed", "Passed", counts["pass"]),
        Entry("num_failed", "Failed", counts["fail"]),
        Entry("num_not_run", "Not run or inconclusive", counts["not_run"] + counts["inconclusive"]),
    ]
    return Report(TITLE, WIDTH, [Section(summary), *map(_section, checks)], list_names=("checks",))


def _section(check: Check) -> Section:
    entries = [
        Entry("name", None, check.name),
        Entry("result", "Result", check.result),
        Entry("detail", "Because", check.detail),
        Entry("figures", None, dict(check.figures)),
    ]
    if "p_value" in check.figures:
        entries += _times(check.figures)
    return Section(entries, label=check.name.replace("_", " ").capitalize(), list_name="checks")


def _times(figures: Mapping[str, Any]) -> list[Entry]:
    labels = {"others": "Another tenant's stored prompt", "unseen": "Unseen prompt", "own": "Own stored prompt"}
    rows = [
        Entry(f"figures.{kind}_median_ms", f"{label}, median (ms)", figures[f"{kind}_median_ms"])
        for kind, label in labels.items()
    ]
    interval = f"{figures['auc']:.2f} ({figures['auc_low']:.2f} to {figures['auc_high']:.2f})"
    return [
        *rows,
        Entry("figures.auc", "Another's above unseen (0.5: no effect)", figures["auc"], text=interval),
        Entry("figures.control_auc", "Own above unseen", figures["control_auc"]),
    ]
