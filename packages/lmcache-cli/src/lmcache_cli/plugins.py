"""Commands of other distributions: entry points of the group `lmcache.commands`.

The name of an entry point is the command's (`server`), or that of a group and its member (`bench.server`); its object
is a click command, imported only when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from lmcache_cli import _distribution
from lmcache_cli._version import __version__
from lmcache_cli.errors import CommandError, UsageFault

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "lmcache.commands"

RUNTIME = {
    "server": "Launch the LMCache server (ZMQ + HTTP). Needs the full package.",
    "engine": "Serve a small model with the cache, no vLLM. Needs the full package.",
    "demo": "Server and engine, one long document asked again. Needs the full package.",
    "bench.server": "Store and retrieve against a running server. Needs the full package.",
    "bench.tier": "Store to and load from one tier below L1. Needs the full package.",
}
"""Commands that come with the full package; they join through their entry points like any other."""


def names(group: str = "") -> set[str]:
    """Commands of ``group`` (of the root by default), those of the full package included."""
    dotted = {*RUNTIME, *_entry_points()}
    if not group:
        return {name for name in dotted if "." not in name}
    return {name.removeprefix(f"{group}.") for name in dotted if name.startswith(f"{group}.")}


def find(name: str) -> click.Command | None:
    """The command of that dotted name, imported now; None when there is none.

    Raises:
        UsageFault: it belongs to the full package, which is not here.
        CommandError: it cannot be loaded.
    """
    entry_point = _entry_points().get(name)
    if entry_point is not None:
        return _load(name, entry_point)
    if name in RUNTIME:
        raise UsageFault(
            f"`{name.replace('.', ' ')}` needs the full package: uninstall {_distribution.THIN}, then install the "
            f"{_distribution.FULL} wheel of the same version ({__version__}), or use another environment"
        )
    return None


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points  # 40 ms: only where a name is not built in, and for the help

    return {entry_point.name: entry_point for entry_point in entry_points(group=ENTRY_POINT_GROUP)}


def _load(name: str, entry_point: EntryPoint) -> click.Command:
    name = name.replace(".", " ")
    try:
        command = entry_point.load()
    except (ImportError, AttributeError) as error:
        raise CommandError(
            f"`{name}` cannot be loaded from {entry_point.value} ({error}); if files of an installed package are "
            "missing, uninstall that package and install it again from its wheel file or a checkout"
        ) from error
    if not isinstance(command, click.Command):
        raise CommandError(f"`{name}` cannot be loaded: {entry_point.value} is not a click command")
    return command
