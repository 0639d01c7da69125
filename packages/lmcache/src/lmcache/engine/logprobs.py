"""How likely a generated token was, and which were likelier: computed from the logits, written as OpenAI does.

Of the model's own logits, in float32, before temperature: equal logits give equal numbers to the last bit. Of equally
likely tokens those with lower ids come first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

COMPLETION_TOP_MAX = 5
CHAT_TOP_MAX = 20
FLOOR = -9999.0
"""Stands for what has no finite logarithm, which JSON cannot write."""

_UNSPELLED = "\ufffd"


@dataclass(frozen=True, slots=True)
class Score:
    """One generated token.

    Attributes:
        logprob: natural logarithm of its share.
        top: the likeliest tokens and theirs, the likeliest first.
        start: letters of the answer before it.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    start: int


def score(logits: torch.Tensor, token: int, num_top: int, start: int) -> Score:
    """The score of ``token`` among ``logits`` [vocabulary], with the ``num_top`` likeliest."""
    logprobs = torch.log_softmax(logits.float(), dim=-1).nan_to_num(nan=FLOOR, neginf=FLOOR)
    top: tuple[tuple[int, float], ...] = ()
    if num_top:
        num_top = min(num_top, len(logprobs))
        least = torch.topk(logprobs, num_top).values[-1]
        candidates = (logprobs >= least).nonzero().flatten()
        values, order = logprobs[candidates].sort(descending=True, stable=True)
        top = tuple(zip(candidates[order][:num_top].tolist(), values[:num_top].tolist(), strict=True))
    return Score(token, float(logprobs[token]), top, start)


def name(token: int, spell: Callable[[int], str], by_id: bool) -> str:
    """A token by its text; by its id where that is asked for, or where it has no text of its own (half a letter)."""
    text = "" if by_id else spell(token)
    return text if text and _UNSPELLED not in text else f"token_id:{token}"


def completion_block(scores: Sequence[Score], spell: Callable[[int], str], by_id: bool) -> dict[str, Any]:
    """``logprobs`` of a completion. The token itself is always among its ``top_logprobs``; of several that are written
    alike the likeliest is."""
    tops: list[dict[str, float]] = []
    for each in scores:
        named: dict[str, float] = {}
        for token, logprob in (*each.top, (each.token, each.logprob)):
            named.setdefault(name(token, spell, by_id), logprob)
        tops.append(named)
    return {
        "tokens": [name(each.token, spell, by_id) for each in scores],
        "token_logprobs": [each.logprob for each in scores],
        "top_logprobs": tops,
        "text_offset": [each.start for each in scores],
    }


def chat_block(scores: Sequence[Score], spell: Callable[[int], str], by_id: bool) -> dict[str, Any]:
    """``logprobs`` of a chat's choice; ``bytes`` is null where a token has no text of its own."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = spell(token)
        data = list(text.encode()) if text and _UNSPELLED not in text else None
        return {"token": name(token, spell, by_id), "logprob": logprob, "bytes": data}

    content = [
        {**entry(each.token, each.logprob), "top_logprobs": [entry(*likely) for likely in each.top]} for each in scores
    ]
    return {"content": content, "refusal": None}
