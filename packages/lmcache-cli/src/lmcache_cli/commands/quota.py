"""`lmcache quota`: how much memory each tenant (cache salt) may hold on a server. 1 GB is 2^30 bytes."""

from __future__ import annotations

import math

import click

from lmcache_cli import api
from lmcache_cli.commands.base import KVCACHE, BaseCommand, server_options, utf8
from lmcache_cli.errors import BadAnswer
from lmcache_cli.groups import Group
from lmcache_cli.render import Entry, Report, Section
from lmcache_cli.target import Target

LIST_WIDTH = 55
WIDTH = 48


@click.group(cls=Group)
def quota() -> None:
    """Manage the memory limits of tenants.

    A tenant is a cache salt; '' is the tenant of requests without one.
    """


@quota.command("list", cls=BaseCommand, title="Quota List", list_names=("quotas",))
@server_options(KVCACHE)
def list_quotas(target: Target) -> Report:
    """List every tenant that has a limit."""
    from lmcache_cli.client import CacheServer

    with CacheServer(target) as server:
        users = server.quotas().users
    if not users:
        nothing = Section([Entry("num_quotas", "Quotas", 0)])
        return Report("Quota List", LIST_WIDTH, [nothing], list_names=("quotas",))
    sections = [Section([Entry("num_quotas", None, len(users))])]
    sections += [
        Section(
            [
                Entry("cache_salt", "Cache salt", salt, text=repr(salt) if not salt else None),
                Entry("limit_gb", "Limit (GB)", user.limit_gb),
                Entry("current_usage_gb", "Current usage (GB)", user.current_usage_gb),
                *_by_tier(user.usage_by_tier_gb),
            ],
            label=f"Salt: {salt or repr(salt)}",
            list_name="quotas",
        )
        for salt, user in users.items()
    ]
    return Report("Quota List", LIST_WIDTH, sections, list_names=("quotas",))


@quota.command(
    "get", cls=BaseCommand, title="Quota Info", keys=("cache_salt", "limit_gb", "current_usage_gb", "exists")
)
@click.argument("salt", callback=utf8)
@server_options(KVCACHE)
def get_quota(target: Target, salt: str) -> Report:
    """Show the limit of one tenant."""
    from lmcache_cli.client import CacheServer

    with CacheServer(target) as server:
        found = server.quota(salt)
    entries = [
        Entry("cache_salt", "Cache salt", found.cache_salt, text=found.cache_salt or repr(salt)),
        Entry("limit_gb", "Limit (GB)", found.limit_gb),
        Entry("current_usage_gb", "Current usage (GB)", found.current_usage_gb),
        *_by_tier(found.usage_by_tier_gb),
        Entry("exists", "Exists", found.exists),
    ]
    return Report("Quota Info", WIDTH, [Section(entries)])


def _by_tier(usage_gb: dict[str, float]) -> list[Entry]:
    """What a tenant has in L1 and in each tier, where there are tiers that can tell."""
    if len(usage_gb) < 2:
        return []
    text = ", ".join(f"{tier} {used:.2f}" for tier, used in usage_gb.items())
    return [Entry("usage_by_tier_gb", "Usage by tier (GB)", usage_gb, text=text)]


def _limit(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if math.isfinite(value) and value >= 0:
        return value
    raise click.BadParameter("expected a number of GB, 0 or more", ctx, param)


@quota.command("set", cls=BaseCommand, title="Quota Set", keys=("cache_salt", "limit_gb"))
@click.argument("salt", callback=utf8)
@click.option("--limit-gb", metavar="GB", type=float, required=True, callback=_limit, help="Memory it may hold.")
@server_options(KVCACHE)
def set_quota(target: Target, salt: str, limit_gb: float) -> Report:
    """Set the limit of one tenant.

    It holds in L1 and in each tier that can count a tenant's bytes; a tenant at its limit loses its own oldest entries.
    """
    from lmcache_cli.client import CacheServer

    with CacheServer(target) as server:
        changed = server.set_quota(salt, api.QuotaLimit(limit_gb))
    if changed.status != "ok":
        raise BadAnswer(f"{target.url} did not confirm the limit")
    entries = [
        Entry("cache_salt", "Cache salt", changed.cache_salt, text=changed.cache_salt or repr(salt)),
        Entry("limit_gb", "Limit (GB)", changed.limit_gb),
        Entry("status", "Status", "OK"),
    ]
    return Report("Quota Set", WIDTH, [Section(entries)])


@quota.command("delete", cls=BaseCommand, title="Quota Delete", keys=("cache_salt",))
@click.argument("salt", callback=utf8)
@server_options(KVCACHE)
def delete_quota(target: Target, salt: str) -> Report:
    """Remove the limit of one tenant; one that has none is no error (status `not_found`)."""
    from lmcache_cli.client import CacheServer

    with CacheServer(target) as server:
        changed = server.delete_quota(salt)
    if changed.status not in ("removed", "not_found"):
        raise BadAnswer(f"{target.url} did not confirm that the limit was removed")
    entries = [
        Entry("cache_salt", "Cache salt", changed.cache_salt, text=changed.cache_salt or repr(salt)),
        Entry("status", "Status", changed.status),
    ]
    return Report("Quota Delete", WIDTH, [Section(entries)])
