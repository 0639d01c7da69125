"""`lmcache kvcache clear`: manage what a running cache server holds."""

from __future__ import annotations

import click

from lmcache_cli import api
from lmcache_cli.commands.base import KVCACHE, BaseCommand, server_options
from lmcache_cli.groups import Group
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

TITLE = "KV Cache Clear"
WIDTH = 48


@click.group(cls=Group)
def kvcache() -> None:
    """Manage the KV cache of a running LMCache server."""


@kvcache.command("clear", cls=BaseCommand, title=TITLE, keys=("entries_dropped", "entries_kept"))
@server_options(KVCACHE)
def clear(target: Target) -> Report:
    """Drop every entry of L1 that no request is using."""
    from lmcache_cli.client import CacheServer

    with CacheServer(target) as server:
        cleared = server.clear(api.ClearRequest(tier="l1"))
    # servers that do not count say so by null, and show no row
    entries = [
        Entry("status", "Status", "OK"),
        Entry("entries_dropped", _unless_none("Entries dropped", cleared.num_entries), cleared.num_entries),
        Entry("entries_kept", _unless_none("Entries kept (in use)", cleared.num_kept), cleared.num_kept),
    ]
    return Report(TITLE, WIDTH, [Section(entries)])


def _unless_none(label: str, value: int | None) -> str | None:
    return None if value is None else label
