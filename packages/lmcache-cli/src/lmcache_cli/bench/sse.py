"""A stream of events (text/event-stream) out of bytes, and what a chat's events say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lmcache_cli import failures

LINE_BYTES_MAX = 4 << 20


class EventFault(Exception):
    """An event that cannot be read."""

    code = "bad_answer"


class EngineError(EventFault):
    """The engine reports an error in the stream; the text is its own words."""

    code = "engine_error"


class Events:
    """Cuts bytes into events, however they are cut into pieces. Lines end in LF or CRLF."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []  # of a line whose end is not there yet
        self._parts_bytes = 0
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._name = b""

    def feed(self, piece: bytes) -> list[tuple[bytes, bytes]]:
        """(name, data) of every event that ``piece`` completes; the name is mostly empty.

        Raises:
            EventFault: an event is larger than any can be.
        """
        events: list[tuple[bytes, bytes]] = []
        *lines, rest = piece.split(b"\n")
        for line in lines:
            if self._parts:
                line = b"".join(self._parts) + line
                self._parts, self._parts_bytes = [], 0
            self._read_line(line.removesuffix(b"\r"), events)
        if rest:
            self._parts.append(rest)
            self._parts_bytes += len(rest)
        if self._parts_bytes + self._data_bytes > LINE_BYTES_MAX:
            raise EventFault("sent an event that is longer than any can be")
        return events

    def end(self) -> list[tuple[bytes, bytes]]:
        """The event that the stream's end completes, where the last blank line was left out."""
        return self.feed(b"\n\n")

    def _read_line(self, line: bytes, events: list[tuple[bytes, bytes]]) -> None:
        if not line:
            if self._data:
                events.append((self._name, b"\n".join(self._data)))
            self._data, self._data_bytes, self._name = [], 0, b""
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._data_bytes += len(value)
        elif field == b"event":
            self._name = value


@dataclass(frozen=True)
class Usage:
    """Token counts as the engine reports them; None where it does not."""

    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None


@dataclass(frozen=True)
class Delta:
    """What one event of a chat says.

    Attributes:
        text: piece of the answer; ``has_text`` is true for reasoning, too, which is left out of it.
        is_finish: whether it gives the reason for which the answer ends.
    """

    text: str
    has_text: bool
    is_finish: bool
    usage: Usage | None


def read_delta(name: bytes, data: bytes) -> Delta:
    """Read one event of a chat completion.

    Raises:
        EngineError: it is an error.
        EventFault: it is no JSON object.
    """
    try:
        event = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise EventFault("sent an event that is not JSON") from error
    if not isinstance(event, dict):
        raise EventFault("sent an event that is not a JSON object")
    if name == b"error" or event.get("error"):
        raise EngineError(failures.server_words(data) or "without saying which")
    choices = event.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    delta = choice.get("delta")
    content, has_text = "", False
    if isinstance(delta, dict):
        content = _text(delta, "content")
        has_text = bool(content or _text(delta, "reasoning_content") or _text(delta, "reasoning"))
    return Delta(content, has_text, bool(choice.get("finish_reason")), _usage(event.get("usage")))


def _text(delta: dict[str, Any], key: str) -> str:
    value = delta.get(key)
    return value if isinstance(value, str) else ""


def _usage(document: Any) -> Usage | None:
    if not isinstance(document, dict):
        return None
    details = document.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Usage(_count(document.get("prompt_tokens")), _count(document.get("completion_tokens")), _count(cached))


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
