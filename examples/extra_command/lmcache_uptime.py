"""A command of another distribution: `lmcache uptime` says how long a server has been running."""

import click

from lmcache_cli.commands.base import KVCACHE, BaseCommand, server_options
from lmcache_cli.render import Entry, Report, Section


class Uptime(BaseCommand):
    """Adds nothing to BaseCommand but its title and the keys of its document."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, title="Uptime", keys=("url", "uptime_s"), **kwargs)


@click.command("uptime", cls=Uptime)
@server_options(KVCACHE)
def uptime(target):
    """Show how long an LMCache server has been running."""
    from lmcache_cli.client import CacheServer

    with CacheServer(target) as server:
        status = server.status()
    entries = [Entry("url", "URL", target.url), Entry("uptime_s", "Uptime (s)", status.uptime_s)]
    return Report("Uptime", 48, [Section(entries)])
