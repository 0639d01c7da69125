"""`lmcache auth init`: makes the tokens that a server asks of HTTP peers. Files only; no token is ever printed."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from pathlib import Path

import click

from lmcache_cli.errors import CommandError, UsageFault
from lmcache_cli.groups import Group

ROLES = {
    "read": "status, metrics, settings and look-ups",
    "write": "the same, and clearing the cache",
    "admin": "the same, and the limits of tenants",
}
"""Each role and what its token allows."""

SERVER_FILE = "server"
TOKEN_BYTES = 32


@click.group(cls=Group)
def auth() -> None:
    """Manage who may use a server's HTTP API."""


@auth.command()
@click.option(
    "--out",
    metavar="DIR",
    default="lmcache-auth",
    show_default=True,
    help="Folder to make; one that holds anything is left alone.",
)
def init(out: str) -> None:
    """Make one token for each role (read, write, admin), and the file that a server knows them by.

    DIR/server has digests only. DIR/read.token, write.token and admin.token have one token each, to hand to whom they
    are for. All are readable by you alone.
    """
    folder = Path(out)
    tokens = {role: f"lmc_{role}_{secrets.token_urlsafe(TOKEN_BYTES)}" for role in ROLES}
    digests = {role: hashlib.sha256(token.encode()).hexdigest() for role, token in tokens.items()}
    rules = [f"{role:5} sha256:{digest}  # {ROLES[role]}\n" for role, digest in digests.items()]
    contents = {SERVER_FILE: "".join(rules), **{f"{role}.token": f"{token}\n" for role, token in tokens.items()}}
    _write_folder(folder, contents)
    click.echo(f"the server starts with: --auth-file {folder / SERVER_FILE}")
    for role, allowed in ROLES.items():
        click.echo(f"LMCACHE_TOKEN_FILE={folder / f'{role}.token'} allows {allowed}")


def _write_folder(folder: Path, contents: dict[str, str]) -> None:
    """All files or none, in a folder that did not exist or was empty."""
    place = Path(os.path.abspath(folder))  # "." has no name
    draft = place.parent / f".{place.name}.{secrets.token_hex(8)}"
    try:
        draft.mkdir(0o700)
    except (OSError, ValueError) as error:
        raise UsageFault(f"cannot make {folder}: {getattr(error, 'strerror', None) or error}") from error
    try:
        for name, text in contents.items():
            descriptor = os.open(draft / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(text)
                file.flush()
                os.fsync(descriptor)
        draft.rename(place)  # refused where something is there, but for an empty folder
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if os.path.lexists(place):
            raise UsageFault(f"{folder} exists already and is left as it is; choose another --out") from error
        raise CommandError(f"cannot write {folder}: {error.strerror}") from error
