"""One model's conversation with a server: what of a prompt is held comes into a cache, what is new goes out of it.

Synchronous, for one thread, and patient for ``BUDGET_S`` at most: whatever is not there by then is a miss. The copying
and the asking are the same as vLLM's (``connectors.copier``, ``connectors.session``).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import transformers

from lmcache.connectors.copier import CopyWorker, LoadJob, Outcome, StoreJob
from lmcache.connectors.link import Address, Link
from lmcache.connectors.session import Prefix, SchedulerSession
from lmcache.connectors.transformers.caches import (
    BLOCK_TOKENS,
    LayerShape,
    RoomyCache,
    layout_of_tensors,
    probe_shapes,
    tensors_of,
)
from lmcache.connectors.transformers.identity import engine_fields
from lmcache.connectors.transformers.windows import Windows
from lmcache.errors import ConfigError, LayoutError
from lmcache.keys import NAMESPACE_PREFIX_BYTES, extend, namespace, request_namespace
from lmcache.transfer._native import pack_tokens
from lmcache.wire.messages import KEYS_MAX, KernelGroup, Register

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

BUDGET_S = 2.0
"""What one load or store may take at most before generation goes on without it."""

FIRST_ATTACH_S = 1.0
_LOOK_S = 0.0005


@dataclass
class Totals:
    """What became of a session's prompts, in tokens."""

    loaded_tokens: int = 0
    stored_tokens: int = 0  # handed over; what the server already held counts, too
    failed_chunks: int = 0


@dataclass(frozen=True)
class _Memory:
    """A cache's tensors while a job copies them."""

    first_block: int
    tensors: Sequence[object]
    prefix: Prefix | None = None  # the lease of a load


@dataclass
class _Jobs:
    last: int = 0
    open: dict[int, _Memory] = field(default_factory=dict)


class KVCacheSession:
    """Reuses the KV of ``model`` through the LMCache server at ``address``; without one, every load is a miss.

    A model that is not understood is not cached, and the log says why in one line. The model's weights must not change
    while a session is open. Close it, or use it as a context manager.

    Args:
        model: a causal language model of transformers, in host memory.
        address: "tcp://127.0.0.1:5555", or without the scheme; None where the cache is not wanted.
        name: what people call this model (in ``lmcache describe``).

    Raises:
        ConfigError: ``address`` is none.
    """

    def __init__(self, model: Any, address: str | None = "tcp://127.0.0.1:5555", name: str | None = None) -> None:
        self.totals = Totals()
        self._model_name = name or str(getattr(model, "name_or_path", "")) or str(model.config.model_type)
        self._max_tokens = int(getattr(model.config, "max_position_embeddings", 0) or 0)
        self._attention = str(getattr(model.config, "_attn_implementation", None))
        self._jobs = _Jobs()
        self._link: Link | None = None
        self._asking: SchedulerSession | None = None
        self._copier: CopyWorker | None = None
        self._shapes: list[LayerShape] = []
        self._namespace = b""
        where = parse_address(address) if address is not None else None
        try:
            self._shapes = probe_shapes(model)
            self._namespace = namespace(engine_fields(model, self._shapes))
        except LayoutError as error:
            logger.warning("LMCache does not cache this model: %s", error)
            return
        except Exception:
            # A model whose insides are not as we expect is a reason not to cache, not to die.
            logger.exception("LMCache does not cache this model: its identity cannot be told")
            return
        if where is not None:
            self._attach(where)

    def _attach(self, where: Address) -> None:
        asking = Link(where, "transformers scheduler", False, lambda chunk: self._register(chunk, "scheduler"))
        copying = Link(where, "transformers worker", True, lambda chunk: self._register(chunk, "worker"))
        self._asking, self._link = SchedulerSession(asking), asking
        self._windows = Windows()
        self._copier = CopyWorker(copying, self._windows, 0, lambda chunk: chunk // BLOCK_TOKENS)
        deadline = time.monotonic() + FIRST_ATTACH_S
        for link in (asking, copying):
            link.wait_first_try(max(0.0, deadline - time.monotonic()))

    # --- the two verbs ------------------------------------------------------------------------------------------------

    def load(
        self, token_ids: Sequence[int], salt: str = "", cache: RoomyCache | None = None, room_tokens: int = 256
    ) -> tuple[Any, int]:
        """A cache with the longest held prefix of ``token_ids`` in it, and its length in tokens (0 = a miss).

        At least the last token is left to compute, since its logits are wanted.

        Args:
            salt: of the tenant; nothing is shared between salts.
            cache: to be filled from its start, whatever it held before; not to be used again if another one comes back.
            room_tokens: for tokens to come, where a cache is made.
        """
        if not self._shapes:
            return transformers.DynamicCache(), 0
        if cache is None:
            cache = RoomyCache(self._shapes, len(token_ids) + room_tokens)
        cache.set_length(0)
        deadline = time.monotonic() + BUDGET_S
        self._collect()
        prefix = self._ask(token_ids, salt, deadline)
        if prefix is None or self._asking is None:
            return cache, 0
        chunk = prefix.line.chunk_tokens
        if prefix.num_chunks * chunk > min(layer.key_room.shape[2] for layer in cache.layers):
            cache = RoomyCache(self._shapes, len(token_ids) + room_tokens)
        outcome = self._copy_in(cache, prefix, self._keys(token_ids, salt, chunk)[: prefix.num_chunks], deadline)
        if outcome is None:
            logger.warning("a load took longer than %g s; the prompt is computed", BUDGET_S)
            return RoomyCache(self._shapes, len(token_ids) + room_tokens), 0
        good = prefix.num_chunks if outcome.loaded else min(outcome.failed, default=0)
        num_tokens = max(0, min(good * chunk, len(token_ids) - 1))
        cache.set_length(num_tokens)
        self.totals.loaded_tokens += num_tokens
        return cache, num_tokens

    def store(self, token_ids: Sequence[int], cache: Any, salt: str = "") -> int:
        """Hand the whole chunks of ``cache`` over, but what is held already; returns how many tokens the chunks are.

        When it returns, the cache may be changed again.

        Args:
            token_ids: of the sequence whose KV the cache holds, from its first token on; more tokens than it holds
                are left out.
        """
        self._collect()
        chunk = self._asking.chunk_tokens if self._asking is not None else None
        if chunk is None or self._copier is None:
            return 0
        num_chunks = min(len(token_ids), int(cache.get_seq_length())) // chunk
        keys = self._keys(token_ids[: num_chunks * chunk], salt, chunk)
        if not keys:
            return 0
        try:
            tensors = tensors_of(cache, self._shapes, num_chunks * chunk)
        except LayoutError as error:
            logger.warning("a cache is not stored: %s", error)
            return 0
        memory = self._open(tensors, num_chunks * chunk)
        parent = request_namespace(self._namespace, salt, {}, chunk)
        job = StoreJob(
            self._new_job(memory),
            b"".join(keys),
            self._blocks(memory, num_chunks * chunk),
            salt,
            parent[:NAMESPACE_PREFIX_BYTES],
        )
        self._copier.store(job)
        if self._wait(job.id, time.monotonic() + BUDGET_S) is None:
            self._copier.mark([job.id])  # what it has copied is not published: the cache may change from now on
            return 0
        self.totals.stored_tokens += num_chunks * chunk
        return num_chunks * chunk

    def new_cache(self, capacity_tokens: int) -> RoomyCache | None:
        """An empty cache for this model with that much room, to be given to ``load`` again and again; None where the
        model is not understood."""
        return RoomyCache(self._shapes, capacity_tokens) if self._shapes else None

    @property
    def attached(self) -> bool:
        """Whether a server is there now; may be asked from any thread."""
        return self._link is not None and self._link.line is not None

    def close(self) -> None:
        """Detach; a copy that runs is finished first."""
        if self._copier is not None:
            self._copier.close()
        self._collect()
        if self._asking is not None:
            self._asking.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self, token_ids: Sequence[int], salt: str, deadline: float) -> Prefix | None:
        """The held prefix, leased; None for a miss."""
        asking = self._asking
        chunk = asking.chunk_tokens if asking is not None else None
        if asking is None or chunk is None or len(token_ids) < 2:
            return None
        keys = self._keys(token_ids, salt, chunk)
        question = asking.ask(keys) if keys else None
        if question is None:
            return None
        while not asking.poll(question):
            until = question.deadline if question.again_at is None else question.again_at
            left_s = min(deadline, until) - time.monotonic()
            if left_s > 0:
                question.line.client.poll(left_s)
        prefix = question.answer
        if prefix is not None and len(prefix.offsets) != prefix.num_chunks:
            asking.release(prefix)
            return None
        return prefix

    def _keys(self, token_ids: Sequence[int], salt: str, chunk_tokens: int) -> list[bytes]:
        parent = request_namespace(self._namespace, salt, {}, chunk_tokens)
        try:
            packed = pack_tokens(list(token_ids[: KEYS_MAX * chunk_tokens]))
        except (OverflowError, TypeError) as error:
            logger.warning("a prompt is not cached: %s", error)
            return []
        return extend(parent, packed, chunk_tokens)

    # --- copying ------------------------------------------------------------------------------------------------------

    def _copy_in(self, cache: RoomyCache, prefix: Prefix, keys: list[bytes], deadline: float) -> Outcome | None:
        """Begin the load and wait for its end; None when it has not ended in time (it goes on in its window)."""
        assert self._copier is not None
        num_tokens = prefix.num_chunks * prefix.line.chunk_tokens
        cache.set_length(num_tokens)
        memory = self._open(tensors_of(cache, self._shapes, num_tokens), num_tokens, prefix)
        job = LoadJob(
            self._new_job(memory),
            prefix.line.server,
            b"".join(keys),
            self._blocks(memory, num_tokens),
            tuple(prefix.offsets),
            tuple(prefix.checksums),
        )
        self._copier.load(job)
        return self._wait(job.id, deadline)

    def _open(self, tensors: Sequence[Any], num_tokens: int, prefix: Prefix | None = None) -> _Memory:
        return _Memory(self._windows.open(layout_of_tensors(tensors, num_tokens), tensors), tensors, prefix)

    def _blocks(self, memory: _Memory, num_tokens: int) -> tuple[int, ...]:
        return tuple(range(memory.first_block, memory.first_block + num_tokens // BLOCK_TOKENS))

    def _new_job(self, memory: _Memory) -> int:
        self._jobs.last += 1
        self._jobs.open[self._jobs.last] = memory
        return self._jobs.last

    def _wait(self, job: int, deadline: float) -> Outcome | None:
        """The end of a job, or None at the deadline."""
        while True:
            for outcome in self._collect():
                if outcome.id == job:
                    return outcome
            if time.monotonic() > deadline:
                return None
            time.sleep(_LOOK_S)

    def _collect(self) -> list[Outcome]:
        """Jobs that have ended: their memory and leases are given back."""
        outcomes = self._copier.take_outcomes() if self._copier is not None else []
        for outcome in outcomes:
            memory = self._jobs.open.pop(outcome.id)
            self._windows.close(memory.first_block)
            if memory.prefix is not None and self._asking is not None:
                self._asking.release(memory.prefix, outcome.failed)
                self.totals.failed_chunks += len(outcome.failed)
        return outcomes

    # --- what the server is told --------------------------------------------------------------------------------------

    def _register(self, chunk_tokens: int, role: str) -> Register:
        if chunk_tokens % BLOCK_TOKENS:
            raise LayoutError(
                f"the server's chunk of {chunk_tokens} tokens is no multiple of {BLOCK_TOKENS}; "
                f"start the server with --chunk-size {-(-chunk_tokens // BLOCK_TOKENS) * BLOCK_TOKENS}"
            )
        token_bytes = sum(shape.token_bytes for shape in self._shapes)
        return Register(
            0,
            role=role,
            model=self._model_name,
            engine=f"transformers {transformers.__version__}",
            rank=0,
            world_size=1,
            extent_bytes=token_bytes * chunk_tokens if role == "worker" else 0,
            groups=self._groups() if role == "worker" else (),
            namespace=self._namespace if role == "scheduler" else b"",
        )

    def _groups(self) -> tuple[KernelGroup, ...]:
        """One entry for each distinct shape among the layers."""
        return tuple(
            KernelGroup(
                num_layers=self._shapes.count(shape),
                num_blocks=self._max_tokens // BLOCK_TOKENS,
                block_tokens=BLOCK_TOKENS,
                num_heads=shape.key_heads,
                head_size=shape.key_size,
                dtype=str(shape.dtype),
                is_mla=False,
                attention_backend=f"transformers {self._attention}",
                shape="NL x [2, 1, NH, NT, HS]",
                concrete_shape=f"{self._shapes.count(shape)} x "
                f"[2, 1, {shape.key_heads}, {self._max_tokens}, {shape.key_size}]",
            )
            for shape in dict.fromkeys(self._shapes)
        )


def parse_address(text: str) -> Address:
    """The RPC address in "tcp://HOST:PORT" or "HOST:PORT".

    Raises:
        ConfigError: it is none.
    """
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    if not colon or not host or "/" in host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{text!r} is no address of an LMCache server, such as tcp://127.0.0.1:5555")
    return Address(f"tcp://{host}", int(port))
