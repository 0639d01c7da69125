"""`lmcache kvcache clear`: manage what a running cache server holds."""

from __future__ import annotations

import click

from lmcache_cli import api
from lmcache_cli.commands.base import KVCACHE_URL, BaseCommand, url_option
from lmcache_cli.groups import Group
from lmcache_cli.render import Entry, Report, Section

TITLE = "KV Cache Clear"
WIDTH = 48


@click.group(cls=Group)
def kvcache() -> None:
    """Manage the KV cache of a running LMCache server."""


@kvcache.command("clear", cls=BaseCommand, title=TITLE)
@url_option(KVCACHE_URL, "LMCACHE_URL")
def clear(url: str) -> Report:
    """Drop every entry of L1 that no request is using."""
    from lmcache_cli.client import CacheServer

    with CacheServer(url) as server:
        cleared = server.clear(api.ClearRequest(tier="l1"))
    entries = [Entry("status", "Status", "OK")]
    if cleared.num_entries is not None:
        entries.append(Entry("entries_dropped", "Entries dropped", cleared.num_entries))
    if cleared.num_kept is not None:
        entries.append(Entry("entries_kept", "Entries kept (in use)", cleared.num_kept))
    return Report(TITLE, WIDTH, [Section(entries)])
