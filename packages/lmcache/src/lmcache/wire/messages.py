"""What travels between a client and the core, grouped by receiver. See docs/wire.md for the conversation.

A frame is one version byte and one msgpack array ``[tag, id, ...]``; ``id`` is chosen by the client and comes back in
the reply. Lists of chunks travel as one ``bytes`` each, never as msgpack lists: keys as 32-byte links, offsets and
checksums as little-endian uint64, one after another.
"""

from __future__ import annotations

import msgspec

from lmcache.keys import NAMESPACE_PREFIX_BYTES, TENANT_BYTES
from lmcache.wire.message import Message
from lmcache.wire.orders import Admit, Admitted, Enlist, Orders, Promoted, Publish, Work, Written

WIRE_VERSION = 5

NO_EXTENT = (1 << 64) - 1
"""Offset that stands for "none" in a reply."""

KEYS_MAX = 8192
"""Chunks named by one request: two million tokens at 256 a chunk."""

FRAME_BYTES_MAX = 1 << 20
"""A larger frame costs its sender the connection."""

IN_FLIGHT_MAX = 1024
"""Requests of one client that may be unanswered at once."""

TOKEN_BYTES = 16
"""Length of the secret that an attach hands out and a Hello presents."""


class KernelGroup(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Layers of one engine that share a layout; for people and dashboards, the cache does not interpret it."""

    num_layers: int
    num_blocks: int
    block_tokens: int
    num_heads: int
    head_size: int
    dtype: str  # as torch prints it: "torch.float16"
    is_mla: bool
    attention_backend: str
    shape: str  # symbolic: "NL x [2, NB, BS, NH, HS]"
    concrete_shape: str  # "80 x [2, 2048, 128, 8, 128]"


# --- received by the core ---------------------------------------------------------------------------------------------


class Hello(Message, frozen=True, tag="hello"):
    """Opens a conversation.

    With an empty token it asks where to attach and is answered to any local peer. With the token that an attach handed
    out it binds this connection to the attached instance; every other request needs that.
    """

    version: int  # WIRE_VERSION of the client
    token: bytes = b""


class Register(Message, frozen=True, tag="register", gc=True):
    """What the engine process behind this connection is and stores.

    Again = replace: everything it holds goes, unless only ``namespace`` differs (its weights have changed)."""

    role: str  # "scheduler" (looks up) | "worker" (copies)
    model: str
    engine: str  # "vllm 0.32.0"
    rank: int
    world_size: int  # ranks whose extents make one chunk
    extent_bytes: int  # one chunk on one rank; 0 for a scheduler
    device_ids: tuple[int, ...] = ()
    groups: tuple[KernelGroup, ...] = ()
    namespace: bytes = b""  # of a scheduler: what keys.request_namespace starts from; 32 bytes, or empty if not told


class Lookup(Message, frozen=True, tag="lookup"):
    """How long a prefix of these chunks is held? Leases it if ``lease`` is set and the prefix is not empty.

    With ``promote``, what L1 lacks is looked for in the tiers below, and the answer may be ``Promoting``: then ask
    again with the number that it gave. Without, the answer is what L1 holds at this moment."""

    keys: bytes  # KEY_BYTES each, in prompt order
    lease: bool = True
    first_chunk: int = 0  # leading chunks that the engine holds itself: looked up, not leased nor answered in detail
    counted: bool = True  # False for a repetition on behalf of the same request: metrics count a prompt once
    promote: bool = False
    promotion: int = 0  # of the answer to this question before; 0 for the first time


class Release(Message, frozen=True, tag="release"):
    """Ends a lease, or gives a promotion up.

    ``failed`` names the chunks (little-endian uint32 indices into the lease) whose check failed. ``question``, instead
    of ``lease``: the id of a Lookup of this connection whose answer nobody waits for; whatever it granted ends."""

    lease: int = 0
    failed: bytes = b""
    question: int = 0


class Reserve(Message, frozen=True, tag="reserve"):
    """Asks for an extent of this worker's size for each chunk that is not held yet."""

    keys: bytes
    tenant: bytes = bytes(TENANT_BYTES)  # keys.tenant_id of the salt: whose quota the chunks count against
    namespace: bytes = bytes(NAMESPACE_PREFIX_BYTES)  # leading bytes of the request's namespace


class Commit(Message, frozen=True, tag="commit"):
    """Publishes the granted extents of a reservation, whose bytes are written: one checksum (uint64) each, in order."""

    ticket: int
    checksums: bytes


class Abort(Message, frozen=True, tag="abort"):
    """Gives the extents of a reservation back unpublished."""

    ticket: int


class Ping(Message, frozen=True, tag="ping"):
    """Are you there?"""


class Bye(Message, frozen=True, tag="bye"):
    """Everything this instance holds may go; it will not ask again."""


class Snapshot(Message, frozen=True, tag="snapshot"):
    """State and counters for the service process (nobody else may ask)."""


class Clear(Message, frozen=True, tag="clear"):
    """Drop every entry that no lease or reservation holds (service process only)."""


class Peek(Message, frozen=True, tag="peek"):
    """Which of these chunks are held? Nothing is touched, leased or counted (service process only)."""

    keys: bytes


class Tenants(Message, frozen=True, tag="tenants"):
    """The limits of tenants and the namespaces of engines (service process only).

    With a ``salt``, also what that tenant has, whether it has a limit or not."""

    salt: str | None = None


class Limit(Message, frozen=True, tag="limit"):
    """Set or remove the limit of one tenant (service process only)."""

    salt: str
    limit_gb: float | None  # GB of 2**30 bytes; None removes it


Request = (
    Hello
    | Register
    | Lookup
    | Release
    | Reserve
    | Commit
    | Abort
    | Ping
    | Bye
    | Snapshot
    | Clear
    | Peek
    | Tenants
    | Limit
    | Enlist
    | Orders
    | Written
    | Admit
    | Publish
    | Promoted
)


# --- received by the client -------------------------------------------------------------------------------------------


class Welcome(Message, frozen=True, tag="welcome"):
    """Answer to Hello: who this is, and where to attach."""

    server: bytes  # 16 bytes, new at each start of the core
    version: int  # WIRE_VERSION of the server
    software: str  # version of the lmcache package
    chunk_tokens: int
    attach_path: str  # unix stream socket that hands out the pool


class Done(Message, frozen=True, tag="done"):
    """The request was carried out; nothing more to say."""


class Pong(Message, frozen=True, tag="pong"):
    """Answer to Ping."""

    ready_bytes: int  # leading part of the pool whose memory exists: a worker may map it without paying for it


class Found(Message, frozen=True, tag="found"):
    """Answer to Lookup: the first ``num_chunks`` are held.

    ``offsets`` and ``checksums`` cover chunks ``first_chunk`` to ``num_chunks``, all ranks of a chunk together:
    item ``(chunk - first_chunk) * world_size + rank``. ``lease`` 0 means that nothing is pinned (none asked, or no
    chunk).
    """

    num_chunks: int
    lease: int
    lease_s: float  # from now
    offsets: bytes
    checksums: bytes


class Promoting(Message, frozen=True, tag="promoting"):
    """Answer to Lookup: the tiers are being looked through, or chunks are on their way from them to L1.

    Ask again after ``retry_ms`` with this number, within ``PROMOTION_PATIENCE_S`` or it ends; asking counts as
    waiting. Nothing is leased yet.
    """

    promotion: int
    num_chunks: int  # in L1 so far, from the first on
    retry_ms: int


PROMOTION_PATIENCE_S = 5.0


class Granted(Message, frozen=True, tag="granted"):
    """Answer to Reserve. ``states`` has a byte a key: HELD, GRANTED, BUSY (another writer is at it) or FULL."""

    ticket: int  # 0 when nothing was granted
    states: bytes
    offsets: bytes  # uint64 a key, NO_EXTENT where nothing was granted
    ready_bytes: int


HELD, GRANTED, BUSY, FULL = range(4)


class Committed(Message, frozen=True, tag="committed"):
    """Answer to Commit: how many of the extents are visible, or will be once the other ranks have committed theirs."""

    num_chunks: int


class Report(Message, frozen=True, tag="report", gc=True):
    """Answer to Snapshot and Tenants: a JSON document."""

    document: bytes


class Cleared(Message, frozen=True, tag="cleared"):
    """Answer to Clear."""

    num_entries: int
    num_kept: int  # held by a lease or a reservation


class Held(Message, frozen=True, tag="held"):
    """Answer to Peek: a byte a key, 1 where the chunk is held."""

    states: bytes


class Limited(Message, frozen=True, tag="limited"):
    """Answer to Limit: whether the tenant had a limit before."""

    existed: bool


class Refused(Message, frozen=True, tag="refused"):
    """The request was not carried out. ``code`` is one of the REFUSED_* words, ``message`` a sentence for a person."""

    code: str
    message: str
    retry_ms: int = 0  # > 0: the same request may succeed after this time


REFUSED_VERSION = "version"  # the two ends speak different wire versions
REFUSED_REMOTE = "remote"  # the peer is not on this machine
REFUSED_UNKNOWN = "unknown"  # this connection is bound to no attached instance: attach, then Hello
REFUSED_INVALID = "invalid"  # the request contradicts itself or what was registered
REFUSED_OWNER = "owner"  # the lease or ticket is not this instance's, or is gone
REFUSED_BUSY = "busy"  # a limit is reached: see retry_ms
REFUSED_LAYOUT = "layout"  # an extent of that size cannot be had from this pool
REFUSED_INTERNAL = "internal"  # a fault of the server: nothing was changed for certain

Reply = (
    Welcome
    | Done
    | Pong
    | Found
    | Promoting
    | Granted
    | Committed
    | Report
    | Cleared
    | Held
    | Limited
    | Work
    | Admitted
    | Refused
)


# --- attach: one frame each way over a unix stream socket (4-byte little-endian length, msgpack) ----------------------


class Attach(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag="attach"):
    """First and only frame of the client; the socket then stays open, and its end is the death of the process."""

    version: int
    pid: int  # as the client sees itself, for people: credentials come from the socket
    name: str  # "vllm worker 0"
    want_pool: bool  # False for a process that only asks (scheduler side): no descriptor comes


class Attached(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag="attached"):
    """Answer; with ``want_pool`` the pool's descriptor travels beside it (SCM_RIGHTS)."""

    server: bytes
    instance: int
    token: bytes  # TOKEN_BYTES, presented in Hello
    endpoint: str  # where to say it: "unix:///a/path"
    pool_bytes: int
    ready_bytes: int
    chunk_tokens: int
    tenant_secret: bytes  # TENANT_SECRET_BYTES, for keys.tenant_id


class AttachRefused(msgspec.Struct, frozen=True, array_like=True, kw_only=True, tag="attach_refused"):
    """Answer; the socket is closed after it."""

    code: str
    message: str


AttachReply = Attached | AttachRefused
