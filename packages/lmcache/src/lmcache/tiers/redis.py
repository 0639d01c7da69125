"""Objects as values in Redis or Valkey, on one server or a cluster: ``PREFIX:1:KEY``, key in hex, no time to live.

What is kept when memory runs out is the operator's choice (``maxmemory`` and ``maxmemory-policy``): with one of the
policies ``allkeys-*`` the store evicts by itself; with ``noeviction`` it takes nothing more, and ``put`` answers False.
Values are sent from and received into the parts themselves; the first bytes of a reply (at most a header's worth) come
with its length line.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Sequence
from functools import partial

from lmcache.errors import TierError
from lmcache.tiers import objects, redis_accounts
from lmcache.tiers.base import CALL_S, Share, Usage
from lmcache.tiers.options import Options
from lmcache.tiers.redis_accounts import Victim
from lmcache.tiers.redis_cluster import REDIRECTS, Servers, check
from lmcache.tiers.redis_link import Address, Link, Refusal, Reply, command, named
from lmcache.tiers.redis_pool import Pool, Settings

PORT = 6379
FORMAT = objects.VERSION
VALUE_BYTES_MAX = 512 << 20  # proto-max-bulk-len where the server does not tell
PIPELINE_MAX = 4096  # requests sent before the first reply is read
USAGE_S = 0.25  # how long `usage` waits for news
TENANTS_MAX = 4096  # whose bytes we remember

_STATE = [command(b"DBSIZE"), command(b"INFO")]


class RedisTier:
    """The adapter of type ``redis``. See ``docs/tiers.md`` for its options."""

    kind = "RedisL2Adapter"
    survives = True

    def __init__(self, options: Options) -> None:
        options.require("redis", "redis")
        self._settings = _settings(options)
        self._cluster = options.flag("cluster", False)
        if self._cluster and (self._settings.path or self._settings.db):
            raise options.error("a cluster has neither a 'path' nor a 'db'")
        prefix = options.text("prefix", "lmcache")
        if not re.fullmatch(r"[A-Za-z0-9._/-]{1,64}", prefix):
            raise options.error("'prefix' is 1 to 64 letters, digits, '.', '_', '/' or '-'")
        self._prefix = f"{prefix}:{FORMAT}:".encode()
        self.concurrency = options.integer("connections", 4, 1, 64)
        self.backend = "redis"
        first = named(self._settings.addresses[0])
        self.place: str | None = f"{first}/{self._settings.db}" if self._settings.db else first
        self._pool = Pool(self._settings)
        self._servers = Servers(self._pool, self._settings, self._cluster)
        self._value_bytes_max = VALUE_BYTES_MAX
        self._usage = Usage()
        self._refresh: asyncio.Task[None] | None = None
        self._evicted_before: dict[Address, int] = {}
        self._num_evicted = 0
        self._tenant_bytes: dict[bytes, int] = {}
        self._problem: str | None = None

    async def open(self) -> None:
        """Connect, and learn what kind of server it is."""
        await self._greet(self._deadline())
        self._usage = await self._measure(self._deadline())

    async def contains(self, keys: Sequence[bytes]) -> list[int]:
        """Bytes of each object: one round trip, to all servers that hold any of the keys at the same time."""
        deadline = self._deadline()
        if self._servers.stale:
            await self._servers.refresh(deadline)
        names = [self._name(key) for key in keys]
        groups = list(self._servers.grouped(names).values())
        tasks = [self._each(deadline, [names[index] for index in group], b"STRLEN") for group in groups]
        sizes = [0] * len(names)
        for group, replies in zip(groups, await asyncio.gather(*tasks), strict=True):
            for index, reply in zip(group, replies, strict=True):
                sizes[index] = reply if isinstance(reply, int) else 0
        return sizes

    async def put(self, key: bytes, parts: Sequence[memoryview], share: Share) -> bool:
        """SET. False: the store's memory or the tenant's share is full, or the object is longer than a value may be."""
        deadline = self._deadline()
        num_bytes = sum(map(len, parts))
        if num_bytes > self._value_bytes_max:
            self._problem = f"objects of {num_bytes} bytes are longer than a value may be ({self._value_bytes_max})"
            return False
        if share.limit_bytes is not None and not await self._reserve(deadline, key, num_bytes, share):
            return False
        name = self._name(key)
        head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, num_bytes)

        async def send(link: Link) -> Reply:
            await link.send([head, *parts, b"\r\n"])
            return await link.reply()

        reply = await self._servers.on_key(name, deadline, send)
        is_counted = isinstance(reply, Refusal) and share.limit_bytes is not None
        if is_counted and await self._one(deadline, name, b"STRLEN") == 0:  # else an older one is still there
            await self._forget(deadline, share.tenant, key, num_bytes)
        if not isinstance(reply, Refusal) and reply != b"OK":
            raise TierError(f"{named(self._servers.address(name))} answered something that is not the Redis protocol")
        is_limited = reply == b"OK" and share.limit_bytes is not None
        if is_limited and not await self._reserve(deadline, key, num_bytes, share):
            await self._one(deadline, name, b"UNLINK")
            return False
        return self._took(reply, name)

    async def get(self, key: bytes, parts: Sequence[memoryview]) -> bool:
        """GET into ``parts``."""
        deadline = self._deadline()
        name = self._name(key)
        request = command(b"GET", name)

        async def receive(link: Link) -> bool | Refusal:
            await link.send([request])
            return await link.value_into(parts)

        found = await self._servers.on_key(name, deadline, receive)
        if isinstance(found, Refusal):
            if found.code != "WRONGTYPE":
                check(found, self._servers.address(name))
            return False
        return found

    async def delete(self, keys: Sequence[bytes]) -> None:
        """UNLINK, and take the objects out of their tenants' accounts."""
        deadline = self._deadline()
        names = [self._name(key) for key in keys]
        pages = await self._each(deadline, names, b"GETRANGE", b"0", b"%d" % (objects.PAGE_BYTES - 1))
        await self._each(deadline, names, b"UNLINK")
        headers = [header for header in map(_header, pages) if header is not None]
        tenants = sorted({header.tenant for header in headers})
        counted = await self._each(deadline, [self._account(tenant) for tenant in tenants], b"EXISTS")
        accounts = {tenant for tenant, exists in zip(tenants, counted, strict=True) if exists}
        for header in headers:
            if header.tenant in accounts:
                await self._forget(deadline, header.tenant, header.key, header.num_bytes)

    async def usage(self) -> Usage:
        """Asked now; as of the last answer while the servers take their time. ``num_objects`` and the bytes are those
        of the whole database and the whole server: DBSIZE, used_memory, maxmemory."""
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.create_task(self._refresh_usage())
        await asyncio.wait([self._refresh], timeout=USAGE_S)
        known = self._usage
        return Usage(
            num_objects=known.num_objects,
            used_bytes=known.used_bytes,
            capacity_bytes=known.capacity_bytes,
            num_evicted=known.num_evicted + self._num_evicted,
            tenant_bytes=dict(self._tenant_bytes) or None,
            problem=self._problem,
        )

    async def close(self) -> None:
        """Disconnect; calls that still wait end with TierError."""
        self._pool.close()
        if self._refresh is not None:
            await asyncio.wait([self._refresh])

    async def _refresh_usage(self) -> None:
        with contextlib.suppress(TierError):  # calls tell that it fails
            self._usage = await self._measure(self._deadline())

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._settings.timeout_s

    def _name(self, key: bytes) -> bytes:
        return self._prefix + key.hex().encode()

    def _account(self, tenant: bytes) -> bytes:
        return self._prefix + b"tenant:" + tenant.hex().encode()

    async def _greet(self, deadline: float) -> None:
        await self._servers.refresh(deadline)
        address = self._servers.all()[0]
        facts = _facts(await self._servers.at(address, deadline, lambda link: link.ask(b"INFO", b"server")))
        if facts is None:  # INFO may be forbidden; whether we may come in shows all the same
            check(await self._servers.at(address, deadline, lambda link: link.ask(b"STRLEN", self._name(b""))), address)
            facts = {}
        if facts.get("redis_mode") == "cluster" and not self._cluster:
            raise TierError(f"{named(address)} belongs to a cluster: set the option 'cluster' to true")
        name = facts.get("server_name", "redis")
        version = facts.get(f"{name}_version") or facts.get("redis_version", "")
        words = [name, ".".join(version.split(".")[:2]), "cluster" if self._cluster else ""]
        self.backend = " ".join(word for word in words if word)
        limit = await self._servers.at(
            address, deadline, lambda link: link.ask(b"CONFIG", b"GET", b"proto-max-bulk-len")
        )
        if isinstance(limit, list) and len(limit) == 2 and isinstance(limit[1], bytes) and limit[1].isdigit():
            self._value_bytes_max = int(limit[1])

    async def _measure(self, deadline: float) -> Usage:
        num_objects, used_bytes, capacity_bytes, num_evicted = 0, 0, 0, 0
        for address in self._servers.all():
            size, info = await self._servers.at(address, deadline, partial(Link.ask_all, requests=_STATE))
            facts = _facts(info)
            if facts is None or not isinstance(size, int):
                return Usage()
            num_objects += size
            used_bytes += _count(facts, "used_memory")
            capacity_bytes += _count(facts, "maxmemory")
            evicted = _count(facts, "evicted_keys")
            num_evicted += max(0, evicted - self._evicted_before.setdefault(address, evicted))
        return Usage(num_objects, used_bytes, capacity_bytes or None, num_evicted=num_evicted)

    async def _one(self, deadline: float, name: bytes, verb: bytes, *rest: bytes) -> Reply:
        """One command about one key."""
        return await self._servers.on_key(name, deadline, lambda link: link.ask(verb, name, *rest))

    async def _each(self, deadline: float, names: Sequence[bytes], verb: bytes, *rest: bytes) -> list[Reply]:
        """One command about each of many keys, all of one server sent together."""
        answers: list[Reply] = [None] * len(names)
        for address, group in self._servers.grouped(names).items():
            for at in range(0, len(group), PIPELINE_MAX):
                part = group[at : at + PIPELINE_MAX]
                requests = [command(verb, names[index], *rest) for index in part]
                replies = await self._servers.at(address, deadline, partial(Link.ask_all, requests=requests))
                for index, reply in zip(part, replies, strict=True):
                    answer = reply
                    if isinstance(reply, Refusal) and reply.code in REDIRECTS:
                        answer = await self._one(deadline, names[index], verb, *rest)
                    # a value that is no string is none of ours
                    wrong_type = isinstance(answer, Refusal) and answer.code == "WRONGTYPE"
                    answers[index] = None if wrong_type else check(answer, address)
        return answers

    def _took(self, reply: Reply, name: bytes) -> bool:
        """Whether there was room. Raises TierError for any other refusal."""
        if isinstance(reply, Refusal) and reply.code == "OOM":
            self._problem = "the store's memory is full and its maxmemory-policy makes no room: nothing more is stored"
            return False
        check(reply, self._servers.address(name))
        self._problem = None
        return True

    async def _reserve(self, deadline: float, key: bytes, num_bytes: int, share: Share) -> bool:
        """Count an object for its tenant, whose oldest objects make room.

        Once before it is written and once after: in between it may have become another server's victim, which found
        nothing to remove. Counted anew it has another number, and nobody takes it out of the account as that victim.
        """
        limit_bytes = share.limit_bytes or 0
        if num_bytes > limit_bytes:
            return False
        account = self._account(share.tenant)
        victims: list[Victim] = []
        for _ in range(redis_accounts.ROUNDS_MAX):
            work = redis_accounts.reserving(account, key.hex().encode(), num_bytes, limit_bytes, victims)
            answer: int | list[Victim] | Refusal = await self._servers.on_key(account, deadline, work)
            if isinstance(answer, Refusal):
                return self._took(answer, account)
            if isinstance(answer, int):
                self._remember(share.tenant, answer)
                return True
            victims = answer
            await self._each(deadline, [self._prefix + victim.key for victim in victims], b"UNLINK")
            self._num_evicted += len(victims)
        return False  # the limit has shrunk a lot, or others put as fast as we remove: the next put goes on

    async def _forget(self, deadline: float, tenant: bytes, key: bytes, num_bytes: int) -> None:
        account = self._account(tenant)
        work = redis_accounts.forgetting(account, key.hex().encode(), num_bytes)
        self._remember(tenant, await self._servers.on_key(account, deadline, work))

    def _remember(self, tenant: bytes, num_bytes: Reply) -> None:
        known = tenant in self._tenant_bytes or len(self._tenant_bytes) < TENANTS_MAX
        if isinstance(num_bytes, int) and known:
            self._tenant_bytes[tenant] = num_bytes


def _settings(options: Options) -> Settings:
    """How to connect. In a cluster ``host`` may be several, separated by commas, each with a port of its own."""
    path = options.text("path", "") or None
    port = options.integer("port", PORT, 1, 65535)
    addresses = tuple(_address(options, text.strip(), port) for text in options.text("host", "127.0.0.1").split(","))
    tls = options.flag("tls", False)
    files = {name: options.text(name, "") or None for name in ("cacert", "cert", "key")}
    if not tls and any(files.values()):
        raise options.error("'cacert', 'cert' and 'key' need 'tls': true")
    return Settings(
        addresses=((path, 0),) if path else addresses,
        path=path,
        db=options.integer("db", 0, 0, 1 << 20),
        username=options.text("username", "") or None,
        password=options.secret("password"),
        tls=tls,
        tls_check_hostname=options.flag("tls_check_hostname", True),
        timeout_s=options.number("timeout_s", CALL_S, 0.1, 600.0),
        **files,
    )


def _address(options: Options, text: str, port: int) -> Address:
    """``NAME``, ``NAME:PORT``, ``[IPv6]:PORT``, or an IPv6 address alone."""
    bare = text.count(":") > 1 and not text.startswith("[")
    match = re.fullmatch(r"([^\[\]]+)()" if bare else r"(\[[^\[\]]+\]|[^:\[\]]+)(?::(\d{1,5}))?", text)
    if match is None or not 0 < int(match[2] or port) < 65536:
        raise options.error("'host' is a name or an address, or several HOST:PORT separated by commas")
    return match[1].strip("[]"), int(match[2] or port)


def _facts(reply: Reply) -> dict[str, str] | None:
    """The lines ``name:value`` of INFO; None where it was refused."""
    if not isinstance(reply, bytes):
        return None
    pairs = (line.partition(":") for line in reply.decode("utf-8", "replace").splitlines())
    return {name: value for name, _, value in pairs if value}


def _count(facts: dict[str, str], name: str) -> int:
    value = facts.get(name, "")
    return int(value) if value.isdigit() else 0


def _header(page: Reply) -> objects.Header | None:
    """Of an object of at most 400 ranks; a larger one counts until its turn comes as the tenant's oldest."""
    try:
        return objects.decode(page) if isinstance(page, bytes) else None
    except objects.NoObject:
        return None
