"""Ways to serve wrong bytes under a right checksum, or to kill the engine; each was shown on stock vLLM before.

See docs/vllm.md. In every case the output must be what plain vLLM says, and the engine must live.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Plain, prompt, wait_for
from engine import Engine, Server
from models import make_model

EXTENT_BYTES = (
    256 * 2 * 2 * 2 * 64 * 4
)  # tokens, layers, K and V, heads, head size, float32: one chunk of the tiny Llama
BLOCK_BYTES = EXTENT_BYTES // 2


@pytest.fixture
def fresh(logs: Path) -> Iterator[Server]:
    """A server whose pool holds nothing else."""
    with Server(logs, 0.25) as running:
        yield running


def held_copy(engine: Engine, point: str, folder: Path) -> Path:
    """Let every copy of that direction wait for the returned file to go."""
    latch = folder / f"{point}-{time.monotonic_ns()}"
    latch.touch()
    engine.call("hold", point=point, path=str(latch))
    return latch


def wait_reached(latch: Path) -> None:
    """Until a copy waits at the latch."""
    wait_for(Path(f"{latch}.reached").exists, "a copy begins")


def test_corrupt_bytes_are_recomputed_under_vllms_default_policy(engine: Engine, server: Server, plain: Plain) -> None:
    entry = prompt(100, 2048)
    assert engine.call("load_failure_policy")["recompute"]
    engine.generate([entry])
    server.flip_bytes(EXTENT_BYTES, 1)
    answer = engine.generate([entry])
    assert answer["finish"] == ["length"]
    assert answer["tokens"] == plain.tokens([entry])
    assert server.status()["quarantined_count"] >= 8
    again = engine.generate([entry])
    assert again["cached"] == [2047]
    assert again["tokens"] == plain.tokens([entry])


def test_a_load_never_writes_blocks_that_the_engine_computed_itself(
    tiny: Path, fresh: Server, logs: Path, plain: Plain
) -> None:
    whole = prompt(110, 900)
    other = whole[:384] + prompt(111, 130)
    with Engine(tiny, logs, fresh.port, enable_prefix_caching=True) as engine:
        engine.generate([whole])
        assert engine.call("reset")["reset"]
        # Blocks 0 to 2 become this request's, by a load and by its own computation; vLLM shares them by its prefix
        # cache.
        engine.generate([other])
        # The chunk of tokens 256 to 511 straddles: its first block is computed here, and its stored bytes are corrupt.
        fresh.flip_bytes(EXTENT_BYTES, BLOCK_BYTES)
        answer = engine.generate([whole])
        assert fresh.status()["quarantined_count"] > 0
        assert answer["tokens"] == plain.tokens([whole])
        shared = engine.generate([other])
        assert shared["cached"][0] >= 384
        assert shared["tokens"] == plain.tokens([other])


def test_a_failed_load_of_an_aborted_request_leaves_nothing_behind(
    tiny: Path, fresh: Server, logs: Path, tmp_path: Path, plain: Plain
) -> None:
    entry = prompt(120, 1100)
    with Engine(tiny, logs, fresh.port, enable_prefix_caching=True) as engine:
        engine.generate([entry])
        assert engine.call("reset")["reset"]
        fresh.flip_bytes(EXTENT_BYTES, BLOCK_BYTES)
        latch = held_copy(engine, "retrieve", tmp_path)
        engine.begin("abort_after", prompt=entry, steps=40)
        wait_reached(latch)
        time.sleep(0.5)  # let the abort overtake the load
        latch.unlink()
        assert engine.finish()["left"] == 0
        answer = engine.generate([entry])
        assert answer["tokens"] == plain.tokens([entry])


def test_a_store_that_a_preemption_overtakes_is_never_published(
    tiny: Path, fresh: Server, logs: Path, tmp_path: Path, plain: Plain
) -> None:
    prompts = [prompt(130 + index, 500 + 20 * index) for index in range(12)]
    expected = plain.tokens(prompts, max_tokens=120)
    pressed = {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 1024, "max_model_len": 4096}
    with Engine(tiny, logs, fresh.port, enable_prefix_caching=False, **pressed) as engine:
        latch = held_copy(engine, "store", tmp_path)
        engine.begin("generate", prompts=prompts, max_tokens=120, salt=None)
        wait_reached(latch)
        time.sleep(5)  # requests run, run out of blocks, and preempt each other while the first copy waits
        latch.unlink()
        assert engine.finish()["tokens"] == expected
        assert engine.call("preemptions")["preemptions"] > 0
        assert engine.call("counters")["aborted_chunks"] > 0
        for _ in range(2):
            assert engine.generate(prompts, max_tokens=120)["tokens"] == expected
    assert fresh.status()["quarantined_count"] == 0


def test_weights_that_changed_under_the_same_path_find_nothing(tmp_path: Path, server: Server, logs: Path) -> None:
    folder = make_model(tmp_path / "model", "tiny-llama", seed=0)
    entry = prompt(140, 1024)
    with Engine(folder, logs, server.port, enable_prefix_caching=False) as engine:
        old = engine.generate([entry])["tokens"]
        assert engine.generate([entry])["cached"] == [1023]
    shutil.rmtree(folder)
    make_model(folder, "tiny-llama", seed=1)
    with Engine(folder, logs, server.port, enable_prefix_caching=False) as engine:
        cold = engine.generate([entry])
        assert cold["cached"] == [0]
        assert cold["tokens"] != old
        assert engine.generate([entry])["tokens"] == cold["tokens"]
