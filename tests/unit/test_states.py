"""Which states of recurrent layers are whole after a step and not written again, and where a load puts one."""

from __future__ import annotations

import pytest

from lmcache.connectors.vllm.groups import NULL_BLOCK, Group, Groups
from lmcache.connectors.vllm.states import Offer, final_states, state_key
from lmcache.transfer.plan import NOT_WRITTEN

BLOCK = 16
ATTENTION = Group(BLOCK)
STATE = Group(BLOCK, is_state=True)
INNER = Group(BLOCK, is_state=True, has_inner_states=True)


@pytest.mark.parametrize(
    ("offers", "start", "stop", "final"),
    [
        ([(1, 7, 48), (2, 8, 48)], 0, 48, {48: [7, 8]}),
        ([(2, 8, 48), (1, 7, 48)], 47, 48, {48: [7, 8]}),  # a decode that fills a block
        ([(1, 7, 48)], 0, 48, {}),  # not all groups have one there
        ([(1, 7, 48), (2, 8, 32)], 0, 48, {}),
        ([(1, NULL_BLOCK, 48), (2, 8, 48)], 0, 48, {}),
        ([(1, 7, 48), (2, 8, 48)], 48, 60, {}),  # was loaded, or made by a step before
        ([(1, 7, 48), (2, 8, 48)], 0, 60, {}),  # inside of the step, where these kernels leave nothing
        ([(1, 7, 40), (2, 8, 40)], 0, 40, {}),  # in the middle of a block, which is written on
        ([(1, 7, 64), (2, 8, 64)], 0, 48, {}),  # not computed yet
        ([(0, 7, 48), (1, 7, 48), (2, 8, 48)], 0, 48, {48: [7, 8]}),
        ([], 0, 48, {}),
    ],
)
def test_a_state_is_final_where_its_step_ends(
    offers: list[Offer], start: int, stop: int, final: dict[int, list[int]]
) -> None:
    assert final_states(Groups((ATTENTION, STATE, STATE)), offers, start, stop) == final


@pytest.mark.parametrize(
    ("offered", "start", "stop", "is_final"),
    [
        (48, 0, 60, True),
        (48, 0, 64, True),  # the state at the end itself is the running one
        (48, 32, 49, True),
        (48, 40, 60, False),  # the step began inside of a block, whose state is another
        (32, 0, 60, False),  # not the last end of a block that the step passes
        (48, 48, 60, False),
        (60, 0, 60, False),
    ],
)
def test_a_state_inside_of_a_step_is_final_at_the_last_block_only(
    offered: int, start: int, stop: int, is_final: bool
) -> None:
    found = final_states(Groups((INNER, ATTENTION)), [(0, 7, offered)], start, stop)
    assert found == ({offered: [7]} if is_final else {})


def test_a_state_lies_in_the_last_block_of_the_tokens_before_it() -> None:
    groups = Groups((STATE, ATTENTION, STATE))
    tables = [[0, 0, 5], [1, 2, 3], [0, 0, 6, 9]]
    assert groups.state_row(tables, 48) == [5, 6]
    assert groups.state_row(tables, 32) == [NOT_WRITTEN, NOT_WRITTEN]
    assert groups.state_row(tables, 40) == [NOT_WRITTEN, NOT_WRITTEN]
    assert groups.state_row(tables, 0) == [NOT_WRITTEN, NOT_WRITTEN]
    assert groups.state_row(tables, 64) == [NOT_WRITTEN, 9]


def test_a_chunk_of_tokens_has_no_states_in_it() -> None:
    groups = Groups((STATE, ATTENTION, Group(BLOCK, 24)))
    tables = [[0, 7], [1, 2, 3, 4], [0, 6, 8, 9]]
    assert groups.row(tables, 1, 32) == [3, 4, 8, 9]
    assert groups.windowed_blocks([3, 4, 8, 9], 32) == [8, 9]
    assert groups.num_whole_chunks(tables, 32) == 2, "the table of states says nothing of it"


def test_a_state_and_the_chunk_before_it_have_different_keys() -> None:
    keys = [bytes(32), bytes([1]) * 32]
    assert len({*keys, *map(state_key, keys)}) == 4
    assert all(len(state_key(key)) == len(key) for key in keys)
