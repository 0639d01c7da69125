"""The words of the benchmark: what is sent, what came of it, and what a workload is.

All times are seconds on one monotonic clock (``time.perf_counter``) unless a name says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from lmcache_cli.errors import CommandError


@dataclass(frozen=True)
class Request:
    """One request to the engine.

    Attributes:
        id: unique within a run, the same in every run of the same configuration (runs are compared by it).
        messages: of a chat; the benchmark sends chats only, as users do.
        output_tokens_max: `max_tokens`.
        group: what shares a long prefix with it ("document 3"), for the timeline; "" when nothing does.
        is_first: whether it is the first of its group to be sent, warm-up included: the engine computes it, the others
            may be reused.
    """

    id: str
    messages: Sequence[Mapping[str, str]]
    output_tokens_max: int
    group: str = ""
    is_first: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a request failed: ``cause`` is a word to count by (`http_503`, `timeout`, `cut_short`), ``message`` one
    sentence."""

    cause: str
    message: str


@dataclass(frozen=True)
class Outcome:
    """What came of one request.

    Attributes:
        due_s: when it should have been sent (open loop), else when it was.
        sent_s: when its first byte was handed to the socket, after the connection was there.
        text_s: arrival of every piece of text that was not empty (reasoning included).
        end_s: arrival of the last byte, or when it was given up.
        text: the whole answer, reasoning left out.
        prompt_tokens, output_tokens, cached_tokens: as the engine reported them; None when it did not.
        num_attempts: 1 unless `--retries` allowed more.
        failure: None when the stream came to its proper end.
    """

    request: Request
    due_s: float
    sent_s: float
    end_s: float
    text_s: tuple[float, ...] = ()
    text: str = ""
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    num_attempts: int = 1
    failure: Failure | None = None

    @property
    def ttft_s(self) -> float | None:
        """From sending to the first text; None without text."""
        return self.text_s[0] - self.sent_s if self.text_s else None

    @property
    def tpot_s(self) -> float | None:
        """(last - first text) / (n - 1) over the n output tokens that the engine reported; None where n < 2."""
        if not self.text_s or self.output_tokens is None or self.output_tokens < 2:
            return None
        return (self.text_s[-1] - self.text_s[0]) / (self.output_tokens - 1)

    @property
    def e2e_s(self) -> float:
        """From sending to the last byte."""
        return self.end_s - self.sent_s


class Source(Protocol):
    """Hands out the requests of one phase; called by one thread, never waits."""

    def take(self) -> Request | None:
        """The next request that may be sent now; None when there is none now, or (see ``is_exhausted``) no more."""

    def done(self, outcome: Outcome) -> None:
        """A request came to its end; conversations go on from here."""

    @property
    def is_exhausted(self) -> bool:
        """Whether ``take`` will never give one again, even after requests in flight are done."""


class Listed:
    """A source of requests that do not depend on each other, in the order given."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._requests = requests
        self._next = 0

    def take(self) -> Request | None:
        """The next of the list."""
        if self._next == len(self._requests):
            return None
        self._next += 1
        return self._requests[self._next - 1]

    def done(self, outcome: Outcome) -> None:
        """Nothing depends on it."""

    @property
    def is_exhausted(self) -> bool:
        """Whether the list is at its end."""
        return self._next == len(self._requests)


@dataclass(frozen=True)
class Option:
    """One setting of a workload: a flag `--PREFIX-NAME`, a key of the configuration file, a question of the guide.

    Attributes:
        key: `ldqa_document_length`; the flag is `--ldqa-document-length`.
        kind: int, float or str; a str has ``choices``.
        label: the guide's question, with the unit.
        minimum, maximum: inclusive bounds of a number; ``is_open`` excludes the bounds themselves.
    """

    key: str
    kind: type
    default: Any
    label: str
    minimum: float | None = None
    maximum: float | None = None
    is_open: bool = False
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """As it is typed."""
        return "--" + self.key.replace("_", "-")


@dataclass(frozen=True)
class Pacing:
    """When requests are sent.

    Exactly one of ``concurrency`` (closed loop: so many in flight) and ``rate_per_s`` (open loop) is set.

    Attributes:
        arrival: of the open loop: `poisson`, `constant`, or `burst` (all of a second's requests at its start).
        duration_s: no request is sent after this time; what is in flight is finished.
    """

    concurrency: int | None = None
    rate_per_s: float | None = None
    arrival: str = "constant"
    duration_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a workload is going to send, known before the first request.

    Attributes:
        num_requests: measured ones; None when only the duration decides.
        num_warmup_requests: sent before, one after another.
        prompt_tokens: of all measured requests together (None as above), as the workload sized them.
        distinct_tokens: of shared and distinct parts, each counted once: what a cache has to hold.
        documents: (label, number) of what the requests are made of, for people: ("documents", 65).
    """

    num_requests: int | None
    num_warmup_requests: int
    prompt_tokens: int | None
    distinct_tokens: int
    output_tokens_max: int | None
    documents: Sequence[tuple[str, int]] = ()


@dataclass(frozen=True)
class Estimate:
    """How long the measured requests will take, and how that is known.

    Attributes:
        duration_s: None when it is not known.
        basis: `rate` (requests over rate), `duration` (the time after which nothing is sent), `first_requests` (the
            first measured ones), or `none`.
        reason: in words: what it was made from, or why there is none.
    """

    duration_s: float | None
    basis: str
    reason: str


@dataclass(frozen=True)
class Lag:
    """How late the event loop woke, in milliseconds; percentiles to 0.1 ms. ``num`` is how often that was tried."""

    num: int
    p50_ms: float
    p99_ms: float
    max_ms: float


class Texts(Protocol):
    """Makes text of a wanted size in the engine's own tokens; the same seed gives the same text."""

    def words(self, num_tokens: int, *seed: object) -> str:
        """Random words, about ``num_tokens`` of the engine's tokens, different for every seed."""

    @property
    def method(self) -> str:
        """How sizes are known: `tokenize` (asked the engine for every text) or `calibrated` (from usage)."""


class Workload(Protocol):
    """One kind of traffic. An implementation is a class in a file of its own and a line in ``workloads.WORKLOADS``."""

    name: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[tuple[Option, ...]]
    uses_volume: ClassVar[bool]  # whether GB of cache, and so tokens per GB, decide how much is sent
    volume_key: ClassVar[str | None]  # the setting that says how many GB
    pacing_keys: ClassVar[tuple[str, ...]]  # its own options that --concurrency and --request-rate stand against

    def __init__(self, settings: Mapping[str, Any], seed: int, volume_tokens: int | None) -> None:
        """``settings`` by option key, complete; ``volume_tokens`` where ``uses_volume``.

        Raises:
            UsageFault: the settings contradict each other.
        """

    def plan(self) -> Plan:
        """What will be sent; costs nothing."""

    def prepare(self, texts: Texts) -> None:
        """Make all texts; asks the engine for sizes, so it takes a while."""

    def warmup(self) -> Sequence[Request]:
        """Sent before the clock starts, one after another; then ``pause_s`` pass."""

    @property
    def pause_s(self) -> float:
        """Silence between warm-up and measurement."""

    def source(self) -> Source:
        """The measured requests."""

    def pacing(self) -> Pacing:
        """How it is paced unless flags say otherwise."""


class Observer(Protocol):
    """Is told what happens while a run goes on; must return at once (``say`` may take a while)."""

    def say(self, text: str) -> None:
        """A line for people."""

    def begin(self, phase: str, num_requests: int | None) -> None:
        """A phase (`preparing`, `warm-up`, `measuring`) begins; ``num_requests`` None = unknown."""

    def advance(self, num_done: int) -> None:
        """So many steps of `preparing` are done."""

    def sent(self, request: Request) -> None:
        """A request went out."""

    def done(self, outcome: Outcome) -> None:
        """A request came to its end."""


@dataclass
class Run:
    """Everything that one run measured; what is known so far when it was interrupted.

    Attributes:
        config: as in `config.json`, without secrets.
        started_at: UTC, ISO 8601.
        warmup: outcomes before the clock started.
        outcomes: measured ones, in the order in which they ended.
        unsent: how many requests were due and never sent, by the reason: one of ``UNSENT_REASONS``.
        loop_lag: how late the event loop woke while it measured; None when it did not come to that.
        estimate: of the time that the measured requests take, the last one that was made.
        server_before, server_after: hit counters of `--lmcache-url`, None without it.
        sizing: how prompt sizes are known (see ``Texts.method``).
        versions: of us, Python, the engine and the server, where they say so.
    """

    config: Mapping[str, Any]
    model: str
    plan: Plan
    started_at: str
    sizing: str
    warmup: list[Outcome] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    pacing: Pacing = field(default_factory=Pacing)
    unsent: Mapping[str, int] = field(default_factory=dict)
    loop_lag: Lag | None = None
    estimate: Estimate | None = None
    is_interrupted: bool = False
    server_before: Mapping[str, float] | None = None
    server_after: Mapping[str, float] | None = None
    versions: Mapping[str, str | None] = field(default_factory=dict)
    host: Mapping[str, Any] = field(default_factory=dict)

    @property
    def duration_s(self) -> float | None:
        """From the first send to the last byte; None when nothing was sent."""
        if not self.outcomes:
            return None
        return max(o.end_s for o in self.outcomes) - min(o.sent_s for o in self.outcomes)


LATE, CROWDED, NOT_READY, TIME_OVER, INTERRUPTED = UNSENT_REASONS = (
    *("late", "in_flight_max", "nothing_ready", "time_over", "interrupted"),
)
"""Why a request was not sent: its time had passed, since this process was late; too many were in flight; nothing could
be sent at its time, since what comes before it was not answered; `--max-duration` was over; the run was ended."""
CANCELLED = "cancelled"
"""Cause of a request that was given up because the run ended."""


class BenchError(CommandError):
    """A run that could not be carried out."""

    code = "bench"
