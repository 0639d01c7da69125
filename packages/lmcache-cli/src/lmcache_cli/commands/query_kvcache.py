"""`lmcache query kvcache`: how much of a prompt does a cache server hold? One look-up; nothing is moved."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import click

from lmcache_cli import api
from lmcache_cli.commands.base import ENGINE, KVCACHE, BaseCommand, UrlType, server_options, utf8
from lmcache_cli.errors import BadAnswer, CommandError, HttpFailure, UsageFault
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

TITLE = "Query KV Cache"
WIDTH = 50
TOKENS_MAX = 1 << 20
ID_DIGITS_MAX = 20
KEYS = ("url", "prompt_tokens", "chunk_size", "num_models")

_TOKEN_IDS = re.compile(r"\s*\d+(?:[\s,]+\d+)*[\s,]*")


@click.command("kvcache", cls=BaseCommand, title=TITLE, keys=KEYS, list_names=("models",))
@server_options(KVCACHE)
@click.option(
    "--prompt",
    metavar="TEXT|-|@FILE",
    callback=utf8,
    help="Prompt, tokenised by the engine; placeholders as in query engine.",
)
@click.option("--token-ids", metavar="IDS|@FILE", help="Token ids instead: 1,2,3.")
@click.option("--documents", metavar="NAME=PATH", multiple=True, help="File that {NAME} inserts; repeatable.")
@click.option("--model", metavar="NAME", callback=utf8, help="Only what engines that serve this model have stored.")
@click.option("--cache-salt", default="", metavar="SALT", callback=utf8, help="Tenant whose entries are looked up.")
@click.option(
    "--engine-url",
    type=UrlType(),
    default=ENGINE.url,
    envvar=ENGINE.variable,
    show_default=True,
    show_envvar=True,
    help="Engine that tokenises --prompt.",
)
def query_kvcache(
    target: Target,
    prompt: str | None,
    token_ids: str | None,
    documents: tuple[str, ...],
    model: str | None,
    cache_salt: str,
    engine_url: str,
) -> Report:
    """Show how many tokens of a prompt an LMCache server holds, by chunk and tier, and for which model.

    Text is taken as the engine's completions take it, special tokens included; a chat's template is not applied.
    """
    from lmcache_cli.client import CacheServer, Engine

    if (prompt is None) == (token_ids is None):
        raise UsageFault("give either --prompt or --token-ids")
    if token_ids is not None:
        tokens = read_token_ids(token_ids)
    else:
        from lmcache_cli import prompts

        text = prompts.expand(prompts.read(prompt or ""), documents)
        with Engine(Target(engine_url, target.timeout_s, ENGINE.key())) as engine:
            tokens = engine.tokenize(model or engine.first_model(), text, add_special_tokens=True).tokens
    if len(tokens) > TOKENS_MAX:
        raise UsageFault(f"{len(tokens)} tokens are more than one look-up takes ({TOKENS_MAX})")
    with CacheServer(target) as server:
        try:
            reply = server.lookup(api.LookupRequest(tokens, model, cache_salt))
        except HttpFailure as failure:
            if failure.status in (404, 405) and "model" not in str(failure):
                raise CommandError(f"{target.url} is a server that cannot look prompts up over HTTP") from failure
            raise
    if reply.chunk_size is None or reply.chunk_size < 1:
        raise BadAnswer(f"what {target.url}{api.PATH_LOOKUP} answers is no look-up")
    for prefix in reply.models:
        _check(prefix, len(tokens), reply.chunk_size, target.url)
    return lookup_report(reply, target.url, len(tokens))


def _check(prefix: api.ModelPrefix, num_tokens: int, chunk_size: int, url: str) -> None:
    """Whether a server can hold what it claims.

    Raises:
        BadAnswer: it is more than was asked about.
    """
    held, num_chunks = prefix.held_tokens, len(prefix.chunks)
    if held is not None and not 0 <= held <= num_tokens:
        raise BadAnswer(f"{url} claims to hold {held} tokens of a prompt of {num_tokens}")
    if num_chunks > num_tokens // chunk_size:
        raise BadAnswer(f"{url} lists {num_chunks} chunks of {chunk_size} tokens of a prompt of {num_tokens}")


def lookup_report(reply: api.LookupReply, url: str, num_tokens: int) -> Report:
    """The report on one look-up."""
    overview = [
        Entry("url", "URL", url),
        Entry("prompt_tokens", "Prompt tokens", num_tokens),
        Entry("chunk_size", "Chunk size", reply.chunk_size),
        Entry("num_models", "Models known", len(reply.models)),
    ]
    sections = [Section(overview), *(_model(model, num_tokens, reply.chunk_size) for model in reply.models)]
    return Report(TITLE, WIDTH, sections, list_names=("models",))


def _model(model: api.ModelPrefix, num_tokens: int, chunk_size: int | None) -> Section:
    # a server that lists no chunks of a prompt that has some does not say where they lie
    is_listed = bool(model.chunks) or (chunk_size is not None and num_tokens < chunk_size)
    held = sum(chunk.tier is not None for chunk in model.chunks)
    ratio = model.held_tokens / num_tokens if model.held_tokens is not None and num_tokens else None
    text = None if ratio is None else f"{model.held_tokens} ({ratio:.1%})"
    tiers = sorted({chunk.tier for chunk in model.chunks if chunk.tier is not None})
    counts = {tier: sum(chunk.tier == tier for chunk in model.chunks) for tier in tiers}
    held_text = f"{held} of {len(model.chunks)}" if is_listed else None
    entries = [
        Entry("model", "Model", model.model_name),
        Entry("engine", "Engine", model.engine),
        Entry("world_size", "World size", model.world_size),
        Entry("held_tokens", "Held tokens (prefix)", model.held_tokens, text=text),
        Entry("held_ratio", None, ratio),
        Entry("num_chunks", None, len(model.chunks) if is_listed else None),
        Entry("num_chunks_held", "Held chunks", held if is_listed else None, text=held_text),
        Entry("num_chunks_by_tier", None, counts if is_listed else None),
        Entry("chunk_map", "Chunks", _runs(chunk.tier for chunk in model.chunks) or None),
        Entry("chunks", None, [api.to_json(chunk) for chunk in model.chunks]),
    ]
    return Section(entries, label=f"Model: {model.model_name or 'N/A'}", list_name="models")


def _runs(tiers: Iterable[str | None]) -> str:
    """`0-14 l1, 15 not held`."""
    parts, first = [], 0
    for tier, members in itertools.groupby(tiers):
        last = first + len(list(members)) - 1
        parts.append(f"{first if first == last else f'{first}-{last}'} {tier or 'not held'}")
        first = last + 1
    return ", ".join(parts)


def read_token_ids(text: str) -> list[int]:
    """Token ids as a JSON list or separated by commas or blanks; `-` and `@FILE` as for prompts. Raises UsageFault."""
    from lmcache_cli import prompts

    text = prompts.read(text)
    if not _TOKEN_IDS.fullmatch(text):
        raise UsageFault("--token-ids: expected numbers separated by commas or spaces")
    items = re.findall(r"\d+", text)
    # int() itself refuses thousands of digits
    wrong = next((item for item in items if len(item) > ID_DIGITS_MAX or int(item) >= 1 << 32), None)
    if wrong is not None:
        raise UsageFault(f"--token-ids: {wrong[:ID_DIGITS_MAX]}{'...' * (len(wrong) > ID_DIGITS_MAX)} is no token id")
    return [int(item) for item in items]
