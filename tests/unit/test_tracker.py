"""Which tokens of a vLLM request have KV that is final: those of steps that are over, and no drafts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from lmcache.connectors.vllm.tracker import Tracker


def request(computed: int, tokens: int, in_flight: int | None = None) -> Any:
    """The fields of vLLM's Request that count; older ones know nothing of tokens in flight."""
    fields = {"num_computed_tokens": computed, "num_tokens": tokens}
    if in_flight is not None:
        fields["num_in_flight_tokens"] = in_flight
    return cast(Any, SimpleNamespace(**fields))


@pytest.mark.parametrize(
    ("computed", "tokens", "in_flight", "confirmed"),
    [
        (256, 256, 0, 256),
        (256, 300, 0, 256),
        (260, 256, 0, 256),  # four drafts were computed, and none of them accepted yet
        (260, 258, 0, 258),  # two of them were
        (300, 300, 44, 256),  # an asynchronous step is under way
        (304, 300, 48, 256),
        (256, 257, None, 256),
        (0, 256, 0, 0),
    ],
)
def test_only_accepted_tokens_of_steps_that_are_over_are_confirmed(
    computed: int, tokens: int, in_flight: int | None, confirmed: int
) -> None:
    assert Tracker(request(computed, tokens, in_flight)).confirmed_tokens == confirmed


@pytest.mark.parametrize(
    ("computed", "tokens", "scheduled", "known"),
    [(0, 512, 256, 256), (256, 257, 1, 257), (256, 257, 5, 257), (500, 512, 12, 512)],
)
def test_what_a_step_will_have_made_final_counts_no_drafts(
    computed: int, tokens: int, scheduled: int, known: int
) -> None:
    assert Tracker(request(computed, tokens)).known_tokens_after(scheduled) == known
