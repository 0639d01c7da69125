"""One thread that computes: requests wait in a bounded queue and run one after another.

Every request ends in exactly one ``Finished`` or ``Failed``, whatever happens to it. Its caller may cancel it at any
time; what was computed of its prompt until then is kept all the same.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lmcache.connectors.transformers import KVCacheSession
from lmcache.engine.logprobs import Score, score
from lmcache.engine.models import Served
from lmcache.engine.text import TextStream

logger = logging.getLogger(__name__)

QUEUE_MAX = 64
"""Requests that may wait; one more is refused."""

PREFILL_TOKENS = 1024
"""Tokens of one forward of the prompt: between two of them a cancelled request ends."""

_ROOM_TOKENS = 8192
"""Room of the cache that requests share in turn; it grows for a longer one."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What to compute. ``temperature`` 0 is greedy; ``salt`` is of the tenant.

    ``num_top``: of how many likeliest tokens to tell the log probabilities, beside the chosen one; None tells of none.
    """

    token_ids: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    seed: int | None = None
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    salt: str = ""
    num_top: int | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is certain now; the score of the token that came, where scores are asked for and one came."""

    text: str
    score: Score | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """The end: ``reason`` is "stop" or "length"; tokens of the answer, and of the prompt that were not computed."""

    reason: str
    output_tokens: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request that could not be computed."""

    message: str


Event = Piece | Finished | Failed


@dataclass(eq=False, slots=True)
class Job:
    """One request under way. ``tell`` is called on the computing thread, and must not wait."""

    ask: Ask
    tell: Callable[[Event], None]
    cancelled: threading.Event = field(default_factory=threading.Event)


@dataclass
class Counts:
    """What happened since the start."""

    running: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0


class Runner:
    """Computes jobs in order on a thread of its own.

    Args:
        address: of the LMCache server; None = without.
        max_model_len: tokens of the longest sequence.
    """

    def __init__(self, served: Served, address: str | None, max_model_len: int) -> None:
        self._served = served
        self._max_model_len = max_model_len
        self._session = KVCacheSession(served.model, address, served.name)
        self._cache: Any = self._session.new_cache(min(max_model_len, _ROOM_TOKENS))
        self._queue: queue.Queue[Job | None] = queue.Queue(QUEUE_MAX)
        self._stopping = threading.Event()
        self._current: Job | None = None
        self.counts = Counts()
        self._thread = threading.Thread(target=self._run, name="lmcache engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        """Whether requests are still computed."""
        return self._thread.is_alive()

    @property
    def attached(self) -> bool:
        """Whether an LMCache server is there now."""
        return self._session.attached

    def submit(self, job: Job) -> bool:
        """Queue a job; False when the queue is full."""
        try:
            self._queue.put_nowait(job)
        except queue.Full:
            self.counts.refused += 1
            return False
        return True

    def stop(self) -> None:
        """End every request within one step of the model; does not wait."""
        self._stopping.set()
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)

    def close(self, timeout_s: float) -> None:
        """Stop, then detach from the server."""
        self.stop()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while not self._stopping.is_set() and (job := self._queue.get()) is not None:
                self._serve(job)
        finally:
            with contextlib.suppress(queue.Empty):
                while True:
                    if (job := self._queue.get_nowait()) is not None:
                        self._give_up(job)
            self._session.close()

    def _give_up(self, job: Job) -> None:
        self.counts.cancelled += 1
        job.tell(Failed("the engine is stopping"))

    def _serve(self, job: Job) -> None:
        self.counts.running = 1
        try:
            with torch.inference_mode():
                self._compute(job)
        except Exception as error:
            logger.exception("a request failed")
            self.counts.failed += 1
            job.tell(Failed(f"the engine could not compute this: {type(error).__name__}"))
        finally:
            self.counts.running = 0

    def _compute(self, job: Job) -> None:
        ask, tokens = job.ask, list(job.ask.token_ids)
        if self._ended(job):
            self._give_up(job)
            return
        self._cache, cached = self._session.load(tokens, ask.salt, self._cache)
        self.counts.prompt_tokens += len(tokens)
        self.counts.cached_tokens += cached
        logits = self._prefill(job, tokens, cached)
        if logits is not None and (reason := self._decode(job, tokens, logits)) is not None:
            self.counts.finished += 1
            job.tell(Finished(reason, len(tokens) - len(ask.token_ids), cached))
        else:
            self._give_up(job)
        self.counts.output_tokens += len(tokens) - len(ask.token_ids)
        self._session.store(tokens, self._cache, ask.salt)

    def _prefill(self, job: Job, tokens: list[int], start: int) -> torch.Tensor | None:
        """Compute the prompt from ``start`` on; the logits of its last token, or None when cancelled meanwhile."""
        logits = None
        for first in range(start, len(tokens), PREFILL_TOKENS):
            if self._ended(job):
                return None
            logits = self._forward(tokens[first : first + PREFILL_TOKENS])
        return logits

    def _decode(self, job: Job, tokens: list[int], logits: torch.Tensor) -> str | None:
        """Append tokens to ``tokens`` until the end; why it ended, or None when cancelled."""
        ask = job.ask
        pick = _picker(ask)
        text = TextStream(self._served.tokenizer.decode, ask.stops)
        for number in range(ask.max_tokens):
            if number:
                logits = self._forward(tokens[-1:])
            if self._ended(job):
                return None
            token = pick(logits)
            tokens.append(token)
            scored = None if ask.num_top is None else score(logits, token, ask.num_top, text.num_letters)
            if token in self._served.eos and not ask.ignore_eos:
                job.tell(Piece(text.finish(), scored))
                return "stop"
            job.tell(Piece(text.push(token), scored))
            if text.stopped:
                return "stop"
        job.tell(Piece(text.finish()))
        return "stop" if text.stopped else "length"

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        """One step of the model; logits [vocabulary] of the last token."""
        output = self._served.model(
            input_ids=torch.tensor([tokens]), past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _ended(self, job: Job) -> bool:
        return job.cancelled.is_set() or self._stopping.is_set()


def _picker(ask: Ask) -> Callable[[torch.Tensor], int]:
    """How the next token is chosen from logits."""
    if ask.temperature == 0:
        return lambda logits: int(logits.argmax())
    source = torch.Generator()
    if ask.seed is None:
        source.seed()
    else:
        source.manual_seed(ask.seed)

    def sample(logits: torch.Tensor) -> int:
        shares = torch.softmax(logits.float() / ask.temperature, dim=-1)
        return int(torch.multinomial(shares, 1, generator=source))

    return sample
