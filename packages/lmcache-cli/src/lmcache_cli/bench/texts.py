"""Random texts of a wanted size in the engine's own tokens. The same seed gives the same text, on every machine.

Every text begins with a word that no other seed makes, so that no two of them share a prefix of even a block.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

WORDS_FILE = Path(__file__).parent / "words.txt"
MARK_CHARS = 12
ASKS_MAX = 4
SAMPLE_WORDS = 400

Count = Callable[[str], int]


def word_list() -> list[str]:
    """The words that texts are made of."""
    return WORDS_FILE.read_text(encoding="ascii").split()


def mark(*seed: object) -> str:
    """The first word of the text of ``seed``."""
    return hashlib.sha256(repr(seed).encode()).hexdigest()[:MARK_CHARS]


class _Maker:
    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._words = word_list()

    def _random(self, *seed: object) -> random.Random:
        return random.Random(repr((self._seed, *seed)))

    def _text(self, num_words: int, *seed: object) -> list[str]:
        return [mark(self._seed, *seed), *self._random(*seed).choices(self._words, k=max(num_words - 1, 0))]


class TokenizedTexts(_Maker):
    """Sized by the engine's tokenizer: each text is counted, and cut or extended until it fits.

    Args:
        count: the engine's number of tokens of a text, template excluded.
    """

    method = "tokenize"

    def __init__(self, seed: int, count: Count) -> None:
        super().__init__(seed)
        self._count = count
        self._tokens_per_word = max(count(" ".join(self._text(SAMPLE_WORDS, "sample"))) / SAMPLE_WORDS, 0.1)

    def words(self, num_tokens: int, *seed: object) -> str:
        """Random words of ``num_tokens`` tokens, as near as whole words come."""
        num_words = max(1, round(num_tokens / self._tokens_per_word))
        best, best_error = "", 1 << 62
        for _ in range(ASKS_MAX):
            text = " ".join(self._text(num_words, *seed))
            error = self._count(text) - num_tokens
            if abs(error) < abs(best_error):
                best, best_error = text, error
            step = round(error / self._tokens_per_word)
            if step == 0 or num_words - step < 1:
                break
            num_words -= step
        return best


class CalibratedTexts(_Maker):
    """Sized by what the engine counted for two prompts: one word, and that word with the whole list of words behind it.

    Args:
        usage: `usage.prompt_tokens` of a chat with this one message, template included.

    Raises:
        ValueError: the second prompt was not counted as longer than the first.
    """

    method = "calibrated"

    def __init__(self, seed: int, usage: Count) -> None:
        super().__init__(seed)
        first = mark(seed, "sample")
        few = usage(first)
        many = usage(" ".join([first, *self._words]))
        if many <= few:
            raise ValueError(f"one word was counted as {few} tokens, and {len(self._words) + 1} words as {many}")
        self._tokens_per_word = (many - few) / len(self._words)

    def words(self, num_tokens: int, *seed: object) -> str:
        """Random words of about ``num_tokens`` tokens."""
        return " ".join(self._text(max(1, round(num_tokens / self._tokens_per_word)), *seed))
