"""Who may ask what over HTTP: one table, kept in front of the routes.

Whoever asks is given a role first (``Gate``): by its token; without any configured token, by being a process of this
machine (*protected mode*). Then the route that was found asks for one (``GatedRoute``), so that no spelling of a path
can be taken for another one. A route that is not in the table keeps the server from starting.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from lmcache.server.access import Role, Token, bearer, role_of
from lmcache.server.addresses import LocalAddresses
from lmcache.server.http.replies import Rejected, reply
from lmcache_cli import api

ROLES: dict[tuple[str, str], Role | None] = {
    ("GET", api.PATH_HEALTH): None,  # anybody
    ("GET", api.PATH_ROOT): Role.READ,
    ("GET", api.PATH_VERSION): Role.READ,
    ("GET", api.PATH_STATUS): Role.READ,
    ("GET", api.PATH_CONFIG): Role.READ,
    ("GET", api.PATH_METRICS): Role.READ,
    ("POST", api.PATH_LOOKUP): Role.READ,
    ("POST", api.PATH_CLEAR): Role.WRITE,
    # Also to read: a salt is a tenant's secret, and who knows it can reach that tenant's entries.
    ("GET", api.PATH_QUOTA): Role.ADMIN,
    ("GET", f"{api.PATH_QUOTA}/{{salt}}"): Role.ADMIN,
    ("PUT", f"{api.PATH_QUOTA}/{{salt}}"): Role.ADMIN,
    ("DELETE", f"{api.PATH_QUOTA}/{{salt}}"): Role.ADMIN,
}
"""The role that each endpoint asks for, by method and path. Paths that are no endpoint (/docs, a 404) ask for READ."""

COMPLAINT_S = 10.0

_SCOPE_KEY = "lmcache.role"
_FORWARDED = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip", b"via"})
_HOW = "run `lmcache auth init` on its machine and start it with --auth-file"
_REMOTE = f"this server has no token yet and answers processes of its own machine only: to reach it from here, {_HOW}"
_RELAYED = f"this server has no token yet and answers no relayed requests: to put a proxy before it, {_HOW}"
_NAMED = (
    "this server has no token yet and answers only to its address, to localhost and to its host name: to use another "
    f"name, {_HOW}"
)
_FOREIGN_PAGE = f"this server has no token yet and answers no page of another site: to use it from there, {_HOW}"
_NEEDED = (
    "this server asks for a token: send Authorization: Bearer TOKEN (the command line takes it from LMCACHE_TOKEN or "
    "LMCACHE_TOKEN_FILE)"
)
_WRONG = "this token is not, or no longer, one of this server's"

log = logging.getLogger("lmcache.service")


class Access:
    """The tokens of this server, and how many requests were turned away."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tuple(tokens)
        self.num_refused = 0
        self._local = LocalAddresses()
        self._own_names = {"localhost", socket.gethostname().lower()}
        self._complained_at = -COMPLAINT_S

    def admit(self, address: str | None, headers: Iterable[tuple[bytes, bytes]]) -> Role:
        """The role of whoever sends these headers (names in lower case) from this IP address.

        Raises:
            Rejected: it has none, 401 where a token would help and 403 where the server has none.
        """
        if self.tokens:
            values = [value for name, value in headers if name == b"authorization"]
            if not values:
                raise Rejected(401, _NEEDED)
            token = bearer(values)
            role = None if token is None else role_of(self.tokens, token)
            if role is None:
                raise Rejected(401, _WRONG)
            return role
        fields = dict(headers)
        if address is None or address not in self._local:
            raise Rejected(403, _REMOTE)
        if _FORWARDED & fields.keys():
            raise Rejected(403, _RELAYED)
        # Pages of the browser on this machine come from here, too: neither under a name of their own that was turned
        # to this address, nor from another site, do they speak for its user.
        host = fields.get(b"host", b"").decode("latin-1").lower()
        if host and not self._is_own_name(_name(host)):
            raise Rejected(403, _NAMED)
        origin = fields.get(b"origin", b"").decode("latin-1").lower()
        if origin and origin.partition("://")[2] != host:
            raise Rejected(403, _FOREIGN_PAGE)
        return Role.ADMIN

    def count(self, address: str | None) -> None:
        """One request was turned away; the log hears of it, seldom and without what was presented."""
        self.num_refused += 1
        now = time.monotonic()
        if now - self._complained_at >= COMPLAINT_S:
            self._complained_at = now
            log.warning("%d HTTP requests turned away so far, the last one from %s", self.num_refused, address)

    def _is_own_name(self, name: str) -> bool:
        """Whether no other site can be behind a name: only those with a dot can be bought."""
        if name in self._own_names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return "." not in name and name != ""
        return True


class Gate:
    """Gives each request its role, or an answer; only the health check is open to all."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        client = scope.get("client")
        address = None if client is None else str(client[0])
        try:
            scope[_SCOPE_KEY] = self._access.admit(address, scope["headers"])
        except Rejected as rejected:
            if (scope["method"], scope["path"]) != ("GET", api.PATH_HEALTH):
                self._access.count(address)
                answer = reply({"detail": str(rejected)}, rejected.status)
                if rejected.status == 401:
                    answer.headers["WWW-Authenticate"] = "Bearer"
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _name(host: str) -> str:
    """The name in a Host header, "" where there is none to be found."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def is_known(request: Request) -> bool:
    """Whether whoever asks has a role: only of the health check can that be untrue."""
    return _SCOPE_KEY in request.scope


class GatedRoute(APIRoute):
    """A route that asks for the role that the table says."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Called once, when the route is made."""
        handler = super().get_route_handler()
        (method,) = list(self.methods or ())
        needed = ROLES[method, self.path_format]

        async def guarded(request: Request) -> Response:
            role: Role | None = request.scope.get(_SCOPE_KEY)
            if needed is None or (role is not None and role >= needed):
                return await handler(request)
            access: Access = request.app.state.access
            access.count(request.client.host if request.client else None)
            raise Rejected(403, f"this asks for a token of the role {needed}; yours has the role {role}")

        return guarded


def guard(app: FastAPI, access: Access) -> None:
    """Put the gate before an application that has no routes yet."""
    app.state.access = access
    app.router.route_class = GatedRoute
    app.add_middleware(Gate, access=access)
