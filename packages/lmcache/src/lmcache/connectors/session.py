"""The asking side of an engine (its scheduler): how much of a prompt does the server hold? Never waits.

Requests go out and answers come in between two steps of the engine, on the engine's own thread; what has not been
answered by its deadline is a miss, and a server that lets a deadline pass is dropped until it greets again.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from lmcache.connectors.link import Line, Link
from lmcache.errors import PeerSilent
from lmcache.wire.messages import KEYS_MAX, Found, Lookup, Promoting, Refused, Release

LOOKUP_S = 1.0
"""A lookup takes well under a millisecond; a server that needs this long is stopped, and the engine goes on without
it."""

PROMOTION_S = 1.5
"""How long a request waits for chunks that come from the tiers; after that it asks for what has arrived."""

BUDGET_S = 2.0
"""How long a request waits for us altogether, whatever happens."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """A held prefix, pinned by ``lease`` until released (at ``good_until`` on the monotonic clock at the latest).

    ``offsets`` and ``checksums`` cover chunks ``first_chunk`` to ``num_chunks``, all ranks of a chunk together.
    """

    line: Line
    num_chunks: int
    first_chunk: int
    lease: int
    good_until: float
    offsets: array[int]
    checksums: array[int]


@dataclass(eq=False, slots=True)
class Question:
    """One lookup under way. ``answer`` is None both before it is ``over`` and for a miss."""

    line: Line
    request: Lookup
    deadline: float  # of the request that is on its way
    patience_ends: float  # no promotion is waited for any longer
    ends: float  # the request's budget is used up
    again_at: float | None = None  # when to ask again: chunks are on their way from the tiers
    request_id: int = 0
    over: bool = False
    answer: Prefix | None = None


class SchedulerSession:
    """Lookups and releases over a link; all methods are for the engine's scheduling thread."""

    def __init__(self, link: Link, now: Callable[[], float] = time.monotonic) -> None:
        self._link = link
        self._now = now
        self._line: Line | None = None
        self._asked: dict[int, Question] = {}
        self._promoting: dict[Question, None] = {}

    @property
    def chunk_tokens(self) -> int | None:
        """The server's chunk size, or None while there is no server."""
        line = self._refresh()
        return line.chunk_tokens if line else None

    def ask(
        self, keys: Sequence[bytes], first_chunk: int = 0, counted: bool = True, promote: bool = True
    ) -> Question | None:
        """Look a prefix up and lease it; None when there is nobody to ask.

        Args:
            first_chunk: leading chunks that the engine holds itself and will not load.
            counted: False for a repetition on behalf of the same request.
            promote: whether to look for it in the tiers below L1, too.
        """
        line = self._refresh()
        if line is None:
            return None
        request = Lookup(0, keys=b"".join(keys[:KEYS_MAX]), first_chunk=first_chunk, counted=counted, promote=promote)
        now = self._now()
        question = Question(line, request, 0.0, now + PROMOTION_S, now + BUDGET_S)
        return question if self._send(question) else None

    def poll(self, question: Question) -> bool:
        """Whether the question is over: answered, timed out, or its server gone."""
        if not question.over:
            self.pump()
        if not question.over and question.again_at is None and self._now() >= question.deadline:
            self._drop(question.line, "the server did not answer a lookup in time")
        return question.over

    def cancel(self, question: Question) -> None:
        """Nobody waits for this answer any more; what it granted, or will grant, is given back."""
        if question.answer is not None:
            self.release(question.answer)
        elif question.again_at is not None:
            self._promoting.pop(question, None)
            self._release(question.line, question.request.promotion, ())
        elif not question.over:
            self._asked.pop(question.request_id, None)
            question.line.client.forget(question.request_id)
            self._say(question.line, Release(0, question=question.request_id))
        question.over, question.answer = True, None

    def release(self, prefix: Prefix, failed: Sequence[int] = ()) -> None:
        """End the lease; ``failed`` are its chunks (counted from its first) whose bytes were not what was stored."""
        self._release(prefix.line, prefix.lease, failed)

    def pump(self) -> None:
        """Take in what has arrived. Never waits."""
        line = self._refresh()
        if line is None:
            return
        replies = line.client.receive()
        if not replies and line.client.is_over:
            self._drop(line, "the server ended the conversation")
            return
        for reply in replies:
            question = self._asked.pop(reply.id, None)
            if question is None:
                continue
            if isinstance(reply, Refused):
                question.over = True
                if reply.retry_ms == 0:
                    self._drop(line, f"the server refused a lookup: {reply.message}")
                    return
            elif isinstance(reply, Found):
                question.answer = _read(reply, question, self._now())
                question.over = True
                if question.answer is None:
                    self._release(line, reply.lease, ())
            elif isinstance(reply, Promoting):
                self._wait_for(question, reply)
        self._ask_again()

    def _wait_for(self, question: Question, reply: Promoting) -> None:
        question.request = msgspec.structs.replace(question.request, promotion=reply.promotion)
        question.again_at = self._now() + reply.retry_ms / 1000
        self._promoting[question] = None

    def _ask_again(self) -> None:
        """Repeat the questions whose time has come; out of patience, ask for what L1 has by now."""
        now = self._now()
        for question in [question for question in self._promoting if (question.again_at or 0.0) <= now]:
            self._promoting.pop(question, None)
            question.again_at = None
            if now >= question.patience_ends:
                self._release(question.line, question.request.promotion, ())
                question.request = msgspec.structs.replace(question.request, promotion=0, promote=False)
            if question.over or not self._send(question):
                question.over = True

    def _send(self, question: Question) -> bool:
        """Send a question's request; False when the server cannot be reached (its line is dropped then)."""
        try:
            request_id = question.line.client.send(question.request)
        except PeerSilent as error:
            self._drop(question.line, str(error))
            return False
        question.request_id = request_id
        question.deadline = min(self._now() + LOOKUP_S, question.ends)
        self._asked[request_id] = question
        return True

    def register_again(self) -> None:
        """Tell the server what this engine is from now on, by the link's registration; the answer is not waited for."""
        line = self._refresh()
        if line is not None:
            try:
                line.client.send(self._link.registration(line.chunk_tokens))
            except PeerSilent as error:
                self._drop(line, str(error))

    def close(self) -> None:
        """Detach; the server frees what this process held."""
        self._link.close()
        self._refresh()

    def _refresh(self) -> Line | None:
        """The current line; the end of the former one ends its conversation and makes its questions misses."""
        line = self._link.line
        if line is not self._line:
            if self._line is not None:
                self._line.client.close()
                for question in (*self._asked.values(), *self._promoting):
                    question.over = True
                self._asked.clear()
                self._promoting.clear()
            self._line = line
        return line

    def _release(self, line: Line, lease: int, failed: Sequence[int]) -> None:
        if lease:
            self._say(line, Release(0, lease=lease, failed=array("I", failed).tobytes()))

    def _say(self, line: Line, request: Release) -> None:
        """Send what needs no answer, if the line still stands."""
        if self._refresh() is line:
            try:
                line.client.send(request)
            except PeerSilent as error:
                self._drop(line, str(error))

    def _drop(self, line: Line, why: str) -> None:
        self._link.drop(line, why)
        self._refresh()


def _read(reply: Found, question: Question, now: float) -> Prefix | None:
    """The prefix that a reply describes, or None for a miss (a reply that contradicts itself is one, too)."""
    num_leased = reply.num_chunks - question.request.first_chunk
    offsets, checksums = array("Q", reply.offsets), array("Q", reply.checksums)
    if num_leased <= 0 or not reply.lease or len(offsets) != len(checksums) or len(offsets) % num_leased:
        return None
    until = now + reply.lease_s
    return Prefix(question.line, reply.num_chunks, question.request.first_chunk, reply.lease, until, offsets, checksums)
