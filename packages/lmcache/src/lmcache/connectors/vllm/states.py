"""The states of recurrent layers (Mamba, linear attention): which of them vLLM has, and which the server holds.

Attention needs the KV of every token before; a recurrent layer needs one state, that after the last of them. vLLM
(0.32, cache mode "align") has one only where a step ended, or where the last step of a prefill left one inside, and of
these keeps what lies at the end of a block. So most chunks have no state, and a chunk and the state at its end are two
objects with two keys: a prefix is held as far as its chunks are, and a claim ends at the last of these ends whose state
is held, too.

Where a state lies cannot be told from a block table, in which vLLM moves blocks about: it names the block, once, in the
step that makes the state. We take its word only where the block is not written again: behind the step, the request's
running state is in another one. A reference more (``pins.py``) keeps the block from everybody else while it is copied.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lmcache.connectors.session import Prefix, Question, SchedulerSession
from lmcache.connectors.vllm.groups import NULL_BLOCK, Groups
from lmcache.layout import Layout

STATES_ASKED_MAX = 64
"""Ends of chunks, from the last one back, whose states are asked for; one lookup each."""

Offer = tuple[int, int, int]
"""vLLM's word for one state: number of the group, block id, tokens before it."""


def state_key(chunk_key: bytes) -> bytes:
    """Key of the state at the end of a chunk (32 bytes)."""
    return hashlib.sha256(b"lmcache state 1\0" + chunk_key).digest()


@dataclass(frozen=True, slots=True)
class HeldState:
    """A held state: ``num_chunks`` chunks of the prompt lie before it."""

    num_chunks: int
    prefix: Prefix


class StateSearch:
    """For the last of some ends of chunks whose state is held.

    Args:
        keys: of a prompt's chunks, from the first on.
        first: ends of more than so many chunks are wanted,
        last: and of at most so many.
    """

    def __init__(self, session: SchedulerSession, keys: Sequence[bytes], first: int, last: int) -> None:
        self._session = session
        self._asked: list[tuple[int, Question]] = []
        for num_chunks in range(last, max(first, last - STATES_ASKED_MAX), -1):
            # Of the tiers only the likeliest is asked for: that of the same prompt, seen before.
            key, is_likeliest = state_key(keys[num_chunks - 1]), num_chunks == last
            question = session.ask([key], counted=False, promote=is_likeliest)
            if question is None:
                break
            self._asked.append((num_chunks, question))

    def is_over(self) -> bool:
        """Whether every question is."""
        return all(self._session.poll(question) for _, question in self._asked)

    def take(self) -> HeldState | None:
        """The last state that is held, if any is; the leases of the others end."""
        found: HeldState | None = None
        for num_chunks, question in self._asked:
            prefix = question.answer
            if prefix is not None and found is None:
                found = HeldState(num_chunks, prefix)
            elif prefix is not None:
                self._session.release(prefix)
        self._asked.clear()
        return found

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        for _, question in self._asked:
            self._session.cancel(question)
        self._asked.clear()


def final_states(groups: Groups, offers: Sequence[Offer], start: int, stop: int) -> Mapping[int, list[int]]:
    """States that are whole once a step is over, and are not written after it: tokens before each -> its block in every
    group of states, in the order of the groups.

    Args:
        offers: what vLLM has named in this step for the request.
        start: tokens that were computed before the step.
        stop: tokens that will be after it, none of them a draft.
    """
    found: dict[int, dict[int, int]] = {}
    for number, block, num_tokens in offers:
        kind = groups.kinds[number]
        if kind.is_state and block != NULL_BLOCK and num_tokens % kind.block_tokens == 0:
            is_end = num_tokens == stop
            # What lies inside of the step is a state only at the last block's end that the step passes, where vLLM has
            # the layers leave one. Other blocks on the way hold what the step began with, or nothing.
            last = (stop - 1) // kind.block_tokens * kind.block_tokens
            is_inner = kind.has_inner_states and start % kind.block_tokens == 0 and start < num_tokens == last
            if is_end or is_inner:
                found.setdefault(num_tokens, {})[number] = block
    wanted = [number for number, kind in enumerate(groups.kinds) if kind.is_state]
    return {
        num_tokens: [blocks[number] for number in wanted]
        for num_tokens, blocks in found.items()
        if len(blocks) == len(wanted)
    }


def split_layout(layout: Layout) -> tuple[Layout, Layout | None]:
    """The layout of chunks and that of states, each with its groups in vLLM's order."""
    tokens = tuple(group for group in layout.groups if not group.is_state)
    states = tuple(group for group in layout.groups if group.is_state)
    return Layout(tokens), Layout(states) if states else None
