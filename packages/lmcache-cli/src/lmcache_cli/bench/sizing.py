"""How big a text is in the engine's tokens: asked of its tokenizer where there is one, else learnt from its usage."""

from __future__ import annotations

from typing import Protocol

from lmcache_cli.bench.base import BenchError, Texts
from lmcache_cli.bench.texts import CalibratedTexts, TokenizedTexts
from lmcache_cli.errors import BadAnswer, HttpFailure


class _TokenCount(Protocol):
    @property
    def count(self) -> int: ...


class Asked(Protocol):
    """What of an engine's API this needs; ``client.Engine`` is one."""

    def tokenize(self, model: str, prompt: str) -> _TokenCount:
        """Tokens of a text."""

    def chat_usage(self, model: str, content: str, max_tokens: int = 1) -> int | None:
        """Prompt tokens of a chat."""


def texts_for(engine: Asked, model: str, seed: int) -> Texts:
    """Texts sized for ``engine``.

    Raises:
        ServerError: the engine could not be asked.
        BenchError: it has no tokenizer to ask, and does not count prompt tokens either.
    """
    try:
        return TokenizedTexts(seed, lambda text: engine.tokenize(model, text).count)
    except (HttpFailure, BadAnswer) as failure:
        if isinstance(failure, HttpFailure) and failure.status not in (400, 404, 405, 501):
            raise

    def usage(text: str) -> int:
        counted = engine.chat_usage(model, text)
        if counted is None:
            raise BenchError("the engine has no /tokenize and reports no prompt tokens, so prompts cannot be sized")
        return counted

    try:
        return CalibratedTexts(seed, usage)
    except ValueError as error:
        raise BenchError(f"the engine has no /tokenize, and prompts cannot be sized: {error}") from error
