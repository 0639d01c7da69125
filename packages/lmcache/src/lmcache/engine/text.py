"""Generated tokens as text, piece by piece: no character is cut in two, no part of a stop string gets out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "�"
_UNFINISHED_TOKENS_MAX = 8
"""A character of UTF-8 takes at most four tokens; what is still no character after so many never will be one."""

_CONTEXT_TOKENS = 8
"""Tokens decoded again with the new ones: some tokenizers write a token differently at the start of a text."""


class TextStream:
    """Text of a growing list of tokens.

    Args:
        decode: token ids to text.
        stops: strings that end the text, themselves left out.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = tuple(stops)
        self._tokens: list[int] = []
        self._shown = 0  # tokens whose text is taken in
        self._held = ""
        self.stopped = False
        self.num_letters = 0
        """Letters of the tokens so far, but for a last one that is not complete yet."""

    def push(self, token: int) -> str:
        """One more token; the text that is certain now, perhaps none. ``stopped`` says whether a stop string came."""
        self._tokens.append(token)
        fresh = self._fresh()
        waiting = len(self._tokens) - self._shown
        if fresh.endswith(_UNFINISHED) and waiting < _UNFINISHED_TOKENS_MAX:
            return ""
        return self._take(fresh)

    def finish(self) -> str:
        """No more tokens: what was held back."""
        text = self._take(self._fresh()) if self._shown < len(self._tokens) else ""
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _fresh(self) -> str:
        """The text that the tokens since the last ``_take`` add."""
        start = max(0, self._shown - _CONTEXT_TOKENS)
        before = self._decode(self._tokens[start : self._shown])
        return self._decode(self._tokens[start:])[len(before) :]

    def _take(self, fresh: str) -> str:
        self._shown = len(self._tokens)
        self.num_letters += len(fresh)
        text = self._held + fresh
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that is a beginning of ``stop``."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
