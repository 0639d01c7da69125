"""`lmcache audit`: whether tenants are kept apart."""

from __future__ import annotations

import click

from lmcache_cli.commands.audit_isolation import audit_isolation
from lmcache_cli.groups import Group


@click.group(cls=Group)
def audit() -> None:
    """Check that no tenant sees or harms another."""


audit.add_command(audit_isolation)
