"""multi-round-chat: many conversations that go on, each with a history of its own, all behind one system prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lmcache_cli.bench.base import Option, Outcome, Pacing, Plan, Request, Source, Texts
from lmcache_cli.bench.workloads.common import DOCUMENT_TOKENS_MAX, check_size

INPUTS = 64
"""Different questions that a session asks in turn; each is as long as asked for."""


class MultiRoundChat:
    """Sessions take turns; one that waits for its answer is passed over, and the next idle one is served."""

    name: ClassVar[str] = "multi-round-chat"
    summary: ClassVar[str] = "Chats of several rounds, each with its own history."
    options: ClassVar[tuple[Option, ...]] = (
        Option(
            "mrc_shared_prompt_length",
            int,
            2000,
            "Tokens of the shared system prompt (0 = none)",
            0,
            DOCUMENT_TOKENS_MAX,
        ),
        Option("mrc_chat_history_length", int, 10000, "Tokens of each session's history", 1, DOCUMENT_TOKENS_MAX),
        Option("mrc_user_input_length", int, 50, "Tokens of a question", 1, 1_000_000),
        Option("mrc_output_length", int, 200, "Tokens of an answer, at most", 1, 1_000_000),
        Option("mrc_qps", float, 1.0, "Questions per second", 0, 1e5, is_open=True),
        Option("mrc_duration", float, 60.0, "Duration (s)", 0, 86400, is_open=True),
    )
    uses_volume: ClassVar[bool] = True
    volume_key: ClassVar[str | None] = "kv_cache_volume"
    pacing_keys: ClassVar[tuple[str, ...]] = ("mrc_qps",)
    pause_s = 0.0

    def __init__(self, settings: Mapping[str, Any], seed: int, volume_tokens: int | None) -> None:  # noqa: ARG002
        self._settings = settings
        each = settings["mrc_shared_prompt_length"] + settings["mrc_chat_history_length"]
        self._num_sessions = max(1, (volume_tokens or 0) // each)
        self._shared = ""
        self._histories: list[str] = []
        self._inputs: list[str] = []
        expected = int(settings["mrc_qps"] * settings["mrc_duration"])
        check_size(self.plan().distinct_tokens, expected, "lower --kv-cache-volume or --mrc-duration")

    def plan(self) -> Plan:
        """How many questions there will be depends on the pace."""
        history = self._settings["mrc_chat_history_length"]
        return Plan(
            num_requests=None,
            num_warmup_requests=self._num_sessions,
            prompt_tokens=None,
            distinct_tokens=self._settings["mrc_shared_prompt_length"] + self._num_sessions * history,
            output_tokens_max=self._settings["mrc_output_length"],
            documents=(("sessions", self._num_sessions),),
        )

    def prepare(self, texts: Texts) -> None:
        """Make the system prompt, the histories and the questions."""
        shared, history = self._settings["mrc_shared_prompt_length"], self._settings["mrc_chat_history_length"]
        self._shared = texts.words(shared, "shared") if shared else ""
        self._histories = [texts.words(history, "history", index) for index in range(self._num_sessions)]
        length = self._settings["mrc_user_input_length"]
        self._inputs = [texts.words(length, "input", index) for index in range(INPUTS)]

    def warmup(self) -> Sequence[Request]:
        """Every session's history once."""
        return [
            Request(f"warmup_s{index}", [*self._opening(index), _say("user", "Hello")], 1, _group(index), is_first=True)
            for index in range(self._num_sessions)
        ]

    def source(self) -> Source:
        """The sessions' next questions."""
        openings = [self._opening(index) for index in range(self._num_sessions)]
        return Sessions(openings, self._inputs, self._settings["mrc_output_length"])

    def pacing(self) -> Pacing:
        """So many a second, for so long."""
        return Pacing(rate_per_s=self._settings["mrc_qps"], duration_s=self._settings["mrc_duration"])

    def _opening(self, index: int) -> list[Mapping[str, str]]:
        messages = [_say("system", self._shared)] if self._shared else []
        return [*messages, _say("user", self._histories[index]), _say("assistant", "I have read it.")]


class Sessions:
    """A source that asks the next idle session, in turn. What an answer says becomes part of the history; a turn that
    failed leaves no trace in it, and the session's next turn asks the next question."""

    def __init__(
        self, openings: Sequence[Sequence[Mapping[str, str]]], inputs: Sequence[str], output_tokens_max: int
    ) -> None:
        self._histories = [list(opening) for opening in openings]
        self._inputs = inputs
        self._output_tokens_max = output_tokens_max
        self._turns = [0] * len(openings)
        self._busy: dict[str, int] = {}  # request id -> session
        self._is_busy = [False] * len(openings)
        self._next = 0

    def take(self) -> Request | None:
        """The next question of the next idle session; None when all of them wait for an answer."""
        for step in range(len(self._histories)):
            session = (self._next + step) % len(self._histories)
            if not self._is_busy[session]:
                break
        else:
            return None
        self._next = session + 1
        turn = self._turns[session]
        self._turns[session] += 1
        request = Request(
            f"s{session}_r{turn}",
            [*self._histories[session], _say("user", self._input(session, turn))],
            self._output_tokens_max,
            _group(session),
        )
        self._is_busy[session] = True
        self._busy[request.id] = session
        return request

    def done(self, outcome: Outcome) -> None:
        """The session is idle again."""
        session = self._busy.pop(outcome.request.id)
        self._is_busy[session] = False
        if outcome.failure is None and outcome.text:  # none where all of it was reasoning
            self._histories[session] += [outcome.request.messages[-1], _say("assistant", outcome.text)]

    @property
    def is_exhausted(self) -> bool:
        """Never: the duration decides."""
        return False

    def _input(self, session: int, turn: int) -> str:
        return self._inputs[(session + turn) % len(self._inputs)]


def _say(role: str, content: str) -> Mapping[str, str]:
    return {"role": role, "content": content}


def _group(session: int) -> str:
    return f"session {session}"
