"""What the CPU backend cannot do, on the paper engine (``paper.py``): asynchronous scheduling, drafts that are refused,
preemption at any step, windows that slide away under a running copy. Right is: every slot that a computed token would
have read holds what a recomputation would have put there."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import num_objects, prompt, wait_for
from engine import Server
from paper import PaperEngine, Shape, continuation, paper_engine
from paper_groups import BLOCK, Full, Local, State, Window

from lmcache.connectors import copier, session
from lmcache.transfer.plan import CopyEngine

CHUNK = 64
LENGTHS = (90, 200, 333, 460, 511, 650)
NUM_TOKENS = 20
ROUNDS_MAX = 10
"""A store or a lookup may be dropped on a busy machine; then what it was for comes with another round."""

SHAPES = {
    "plain": Shape(),
    "plain, asynchronous": Shape(is_async=True),
    "drafts": Shape(num_drafts=3, prefix_caching=True),
    "drafts, asynchronous": Shape(is_async=True, num_drafts=3),
    "one window": Shape((Window(100),)),
    "full and window": Shape((Full(), Window(100)), prefix_caching=True),
    "full and two windows, asynchronous, drafts": Shape((Full(), Window(40), Window(100)), is_async=True, num_drafts=3),
    "full and local": Shape((Full(), Local(96)), prefix_caching=True),
    "local, asynchronous": Shape((Local(96),), is_async=True),
    "states": Shape((State(), Full(), State()), prefix_caching=True),
    "states, asynchronous, window": Shape((Full(), State(), Window(100)), prefix_caching=True, is_async=True),
    "states inside of steps": Shape((State(has_inner=True), Full()), prefix_caching=True),
}


@pytest.fixture(scope="module")
def server(logs: Path) -> Iterator[Server]:
    """A server with small chunks."""
    with Server(logs, 0.2, "--chunk-size", str(CHUNK)) as running:
        yield running


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that a busy machine does not let pass, so that nothing is dropped."""
    monkeypatch.setattr(copier, "RESERVE_S", 30.0)
    monkeypatch.setattr(session, "LOOKUP_S", 30.0)
    monkeypatch.setattr(session, "BUDGET_S", 60.0)


@pytest.fixture
def slow_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every store begins late, so that the engine has gone on meanwhile. The copy itself stays the real one."""
    real = CopyEngine.store

    def late(*arguments: Any) -> bytes:
        time.sleep(0.03)
        return real(*arguments)

    monkeypatch.setattr(CopyEngine, "store", late)


def ask(engine: PaperEngine, name: str, seeds: range, salt: int) -> None:
    """Add prompts of several lengths; ``salt`` keeps tests apart that share the server."""
    for index, seed in enumerate(seeds):
        engine.add(f"{name}-{index}", prompt(1000 * salt + seed, LENGTHS[index % len(LENGTHS)]), NUM_TOKENS)


def loadable_chunks(shape: Shape, length: int) -> int:
    """Whole chunks of a prompt that was computed alone; with recurrent layers those up to the last state that is at the
    end of one. States are where a step ended, and at the end of the prompt's last block before its last token."""
    if not any(isinstance(kind, State) for kind in shape.groups):
        return length // CHUNK
    last = (length - 1) // BLOCK * BLOCK
    ends = (*range(shape.step_tokens, last, shape.step_tokens), last)
    return max((end // CHUNK for end in ends if end % CHUNK == 0), default=0)


def assert_right(engine: PaperEngine, seeds: range, salt: int) -> None:
    """Every answer is the one of a model that computed everything."""
    for name, tokens in engine.answers.items():
        index = int(name.rpartition("-")[2])
        entry = prompt(1000 * salt + seeds[index], LENGTHS[index % len(LENGTHS)])
        assert tokens == continuation(entry, NUM_TOKENS), name


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_loaded_is_what_would_have_been_computed(name: str, tiny: Path, server: Server) -> None:
    shape, salt, seeds = SHAPES[name], 1 + list(SHAPES).index(name), range(6)
    num_chunks = sum(length // CHUNK for length in LENGTHS)
    # Computed together, prompts leave states where nobody can say, but for their last ones.
    sure = sum(length // CHUNK for length in LENGTHS if (length - 1) // BLOCK * BLOCK % CHUNK == 0)
    has_states = any(isinstance(kind, State) for kind in shape.groups)
    num_wanted = sure if has_states else num_chunks
    with paper_engine(tiny, server.port, shape) as first:
        for turn in range(ROUNDS_MAX):
            ask(first, f"cold{turn}", seeds, salt)
            first.settle()
            if first.counters.stored_chunks >= num_chunks:
                break
            first.forget()
        assert first.counters.stored_chunks >= num_chunks
        assert_right(first, seeds, salt)
    with paper_engine(tiny, server.port, shape) as second:
        for turn in range(ROUNDS_MAX):
            ask(second, f"warm{turn}", seeds, salt)
            second.settle()
            if second.counters.loaded_chunks >= num_wanted:
                break
            second.forget()
        assert second.counters.loaded_chunks >= num_wanted
        assert second.counters.failed_chunks == 0
        if has_states:
            assert second.state_counters.loaded_chunks > 0
            assert second.state_counters.failed_chunks == 0
        assert_right(second, seeds, salt)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("patience")
def test_the_second_ask_of_a_prompt_hits_at_once(name: str, tiny: Path, server: Server) -> None:
    salt, shape = 101 + list(SHAPES).index(name), SHAPES[name]
    with paper_engine(tiny, server.port, shape) as engine:
        for index, length in enumerate(LENGTHS):
            entry = prompt(1000 * salt + index, length)
            for turn in range(2):
                engine.add(f"turn{turn}-{index}", entry, NUM_TOKENS)
                engine.settle()
                engine.forget()
                if turn == 0:
                    assert engine.counters.stored_chunks >= length // CHUNK
                    loaded = engine.counters.loaded_chunks
            assert engine.counters.loaded_chunks - loaded == loadable_chunks(shape, length), length
        assert_right(engine, range(len(LENGTHS)), salt)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("patience")
def test_a_chunk_that_an_answer_completes_is_right_when_the_talk_goes_on(name: str, tiny: Path, server: Server) -> None:
    """The last token of an answer is never computed, and beside it may lie what refused drafts have left: an answer
    that ends at the end of a chunk leaves a chunk that must not be stored."""
    salt, shape = 121 + list(SHAPES).index(name), SHAPES[name]
    keeps_all = all(isinstance(kind, Full) for kind in shape.groups)
    with paper_engine(tiny, server.port, shape, seed=6) as engine:
        # Several answers end at the very end of a chunk: how many drafts the last step accepts is left to chance.
        for case, rest in enumerate((*range(-4, 5), *[0] * 8)):
            entry = prompt(1000 * salt + case, 2 * CHUNK + rest - NUM_TOKENS)
            engine.add(f"first{case}", entry, NUM_TOKENS)
            engine.settle()
            engine.forget()
            loaded = engine.counters.loaded_chunks
            more = [*entry, *engine.answers[f"first{case}"], *prompt(1000 * salt + 50 + case, 60)]
            engine.add(f"second{case}", more, NUM_TOKENS)
            engine.settle()
            engine.forget()
            assert engine.answers[f"first{case}"] == continuation(entry, NUM_TOKENS)
            assert engine.answers[f"second{case}"] == continuation(more, NUM_TOKENS)
            # With drafts the last token may be an accepted one, which is computed.
            if keeps_all and (rest or not shape.num_drafts):
                assert engine.counters.loaded_chunks - loaded == (2 if rest > 0 else 1)
        assert engine.counters.failed_chunks == 0


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("slow_stores")
def test_blocks_that_change_hands_under_a_store_are_never_published(name: str, tiny: Path, server: Server) -> None:
    """Few blocks, so that vLLM preempts by itself, and all requests preempted now and then beside."""
    salt, seeds = 21 + list(SHAPES).index(name), range(6)
    numbers = random.Random(name)
    tight = dataclasses.replace(SHAPES[name], num_blocks=60 + 45 * (len(SHAPES[name].groups) - 1))
    with paper_engine(tiny, server.port, tight, seed=3) as engine:
        for turn in range(ROUNDS_MAX):
            ask(engine, f"turn{turn}", seeds, salt)
            for _ in range(numbers.randrange(5, 25)):
                engine.step()
            engine.preempt_all()
            engine.settle()
            if turn >= 2 and engine.num_preempted:
                break
        assert engine.num_preempted > 0
        assert_right(engine, seeds, salt)
        wait_for(lambda: server.status()["active_sessions"] == 0, "all leases and reservations are given back")
        assert engine.num_free_blocks == tight.num_blocks - 1, "every block is back in vLLM's pool"


@pytest.mark.parametrize(
    "name", ["plain, asynchronous", "full and two windows, asynchronous, drafts", "states, asynchronous, window"]
)
def test_preemption_at_every_step(name: str, tiny: Path, server: Server) -> None:
    salt, seeds = 41 + list(SHAPES).index(name), range(3)
    with paper_engine(tiny, server.port, SHAPES[name], seed=4) as engine:
        for at in range(24):
            ask(engine, f"at{at}", seeds, salt)
            for _ in range(at):
                engine.step()
            engine.preempt_all()
            engine.settle()
        assert engine.num_preempted > 10
        assert_right(engine, seeds, salt)


@pytest.mark.parametrize("name", ["plain", "one window", "full and window", "full and local", "states"])
def test_damaged_chunks_are_recomputed(name: str, tiny: Path, logs: Path) -> None:
    """With several tables, or with a window, vLLM computes the whole request; else from the damaged block on."""
    seeds = range(6)
    options = ("--chunk-size", str(CHUNK))
    with Server(logs, 0.2, *options) as server, paper_engine(tiny, server.port, SHAPES[name]) as engine:
        for turn in range(ROUNDS_MAX):
            ask(engine, f"cold{turn}", seeds, 61)
            engine.settle()
            engine.forget()
            if num_objects(server) > len(seeds):
                break
        server.flip_bytes(every_bytes=4096, first_bytes=16)
        for turn in range(ROUNDS_MAX):
            ask(engine, f"damaged{turn}", seeds, 61)
            engine.settle()
            engine.forget()
            if engine.counters.failed_chunks:
                break
        assert engine.counters.failed_chunks > 0
        assert (engine.num_failed > 0) == (name != "plain")
        assert_right(engine, seeds, 61)
        assert not [answer for answer in engine.answers.values() if len(answer) != NUM_TOKENS]


@pytest.mark.parametrize("name", ["plain, asynchronous", "full and window", "states", "states, asynchronous, window"])
def test_a_request_that_ends_early_leaves_nothing_behind(name: str, tiny: Path, server: Server) -> None:
    salt, seeds = 81 + list(SHAPES).index(name), range(3)
    with paper_engine(tiny, server.port, SHAPES[name], seed=5) as engine:
        for at in range(12):
            ask(engine, f"at{at}", seeds, salt)
            for _ in range(at):
                engine.step()
            engine.abort(f"at{at}-1")
            engine.settle()
            del engine.answers[f"at{at}-1"]
        assert_right(engine, seeds, salt)
        assert engine.num_free_blocks == SHAPES[name].num_blocks - 1
        wait_for(lambda: server.status()["active_sessions"] == 0, "all leases and reservations are given back")
