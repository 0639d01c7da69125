"""`lmcache verify`: whether a cache changes what is answered."""

from __future__ import annotations

import click

from lmcache_cli.commands.verify_engine import verify_engine
from lmcache_cli.groups import Group


@click.group(cls=Group)
def verify() -> None:
    """Check that the cache changes no answer."""


verify.add_command(verify_engine)
