"""Never a burden: whatever happens to the server, vLLM answers as if we were not there, and attaches again."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Plain, expected_hit, num_objects, prompt, wait_for
from engine import Engine, Server
from test_wrong_bytes import held_copy, wait_reached


@pytest.fixture
def pair(tiny: Path, logs: Path) -> Iterator[tuple[Engine, Server]]:
    """An engine that started before its server did."""
    with Server(logs) as server:
        server.stop()
        with Engine(tiny, logs, server.port, enable_prefix_caching=False) as engine:
            yield engine, server


def attached(server: Server) -> bool:
    """Both halves of the engine are there."""
    return bool(server.status()["attached_processes"] == 2)


def test_server_absent_at_start_then_started_killed_stopped_and_started_again(
    pair: tuple[Engine, Server], plain: Plain
) -> None:
    engine, server = pair
    entry = prompt(200, 1200)
    expected = plain.tokens([entry])
    alone = engine.generate([entry])
    assert (alone["cached"], alone["tokens"]) == ([0], expected)

    server.start()
    wait_for(lambda: attached(server), "the engine attaches to a server that came later")
    engine.generate([entry])
    warm = engine.generate([entry])
    assert (warm["cached"], warm["tokens"]) == ([expected_hit(1200)], expected)

    server.kill()
    orphan = engine.generate([entry])
    assert (orphan["cached"], orphan["tokens"]) == ([0], expected)
    server.start()
    wait_for(lambda: attached(server), "the engine attaches again after kill -9")
    adopted = engine.generate([entry])
    assert (adopted["cached"], adopted["tokens"]) == ([expected_hit(1200)], expected)

    server.signal(signal.SIGSTOP)
    frozen = [engine.generate([entry]) for _ in range(2)]
    assert [answer["tokens"] for answer in frozen] == [expected, expected]
    server.signal(signal.SIGCONT)
    wait_for(lambda: attached(server), "the engine attaches again after SIGCONT")
    thawed = engine.generate([entry])
    assert (thawed["cached"], thawed["tokens"]) == ([expected_hit(1200)], expected)

    server.stop()
    server.start()
    wait_for(lambda: attached(server), "the engine attaches to a server that was stopped cleanly and started")
    assert num_objects(server) == 0
    assert engine.generate([entry])["tokens"] == [expected[0]]


@pytest.mark.parametrize("point", ["store", "retrieve"])
def test_server_killed_inside_a_copy(pair: tuple[Engine, Server], tmp_path: Path, plain: Plain, point: str) -> None:
    engine, server = pair
    server.start()
    wait_for(lambda: attached(server), "the engine attaches")
    entry = prompt(210, 1300)
    expected = plain.tokens([entry])
    if point == "retrieve":
        engine.generate([entry])
    latch = held_copy(engine, point, tmp_path)
    engine.begin("generate", prompts=[entry], max_tokens=16, salt=None)
    wait_reached(latch)
    server.kill()
    latch.unlink()
    assert engine.finish()["tokens"] == expected
    server.start()
    wait_for(lambda: attached(server), "the engine attaches again")
    for _ in range(2):
        answer = engine.generate([entry])
        assert answer["tokens"] == expected
    assert answer["cached"] == [expected_hit(1300)]
    assert server.status()["quarantined_count"] == 0


def test_server_killed_inside_a_lookup(pair: tuple[Engine, Server], plain: Plain) -> None:
    engine, server = pair
    server.start()
    wait_for(lambda: attached(server), "the engine attaches")
    entry = prompt(220, 1300)
    engine.generate([entry])
    server.signal(signal.SIGSTOP)
    engine.begin("generate", prompts=[entry], max_tokens=16, salt=None)
    time.sleep(0.3)
    server.kill()
    answer = engine.finish()
    assert (answer["cached"], answer["tokens"]) == ([0], plain.tokens([entry]))


def test_a_full_server_forgets_and_vllm_does_not_notice(tiny: Path, logs: Path, plain: Plain) -> None:
    with Server(logs, 0.0625) as server, Engine(tiny, logs, server.port, enable_prefix_caching=False) as engine:
        prompts = [prompt(230 + index, 4096) for index in range(12)]
        expected = plain.tokens(prompts)
        for entry, tokens in [*zip(prompts, expected, strict=True)] * 2:
            assert engine.generate([entry])["tokens"] == [tokens]
        assert engine.generate(prompts[-1:])["cached"] == [4095]
        manager = server.status()["storage_manager"]["l1_manager"]
        assert manager["memory_used_bytes"] <= manager["memory_total_bytes"] == 64 << 20


def test_a_worker_that_cannot_load_is_not_asked_again_and_again(pair: tuple[Engine, Server], plain: Plain) -> None:
    engine, server = pair
    server.start()
    wait_for(lambda: attached(server), "the engine attaches")
    entries = [prompt(270 + index, 900) for index in range(3)]
    engine.generate(entries)
    engine.call("lose_worker")
    answers = [engine.generate([entry]) for entry in entries]
    assert [answer["tokens"][0] for answer in answers] == plain.tokens(entries)
    assert engine.log.count("Recovered from KV load failure") == 1


def test_a_chunk_that_is_no_multiple_of_the_block_is_said_once_and_passed_through(
    tiny: Path, logs: Path, plain: Plain
) -> None:
    with Server(logs, 0.25, "--chunk-size", "192") as server:
        with Engine(tiny, logs, server.port, enable_prefix_caching=False) as engine:
            for _ in range(2):
                answer = engine.generate([prompt(250, 900)])
                assert (answer["cached"], answer["tokens"]) == ([0], plain.tokens([prompt(250, 900)]))
            told = [line for line in engine.log.splitlines() if "no multiple of this engine's block of 128" in line]
        assert len(told) == 2  # one line of each half
        assert all("--chunk-size 256" in line for line in told)


def test_under_multiconnector_the_limit_of_the_failure_policy_is_said_at_start(
    tiny: Path, server: Server, logs: Path, plain: Plain
) -> None:
    inner = {
        "kv_connector": "LMCacheMPConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port},
    }
    outer = {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [inner]},
    }
    with Engine(tiny, logs, enable_prefix_caching=False, kv_transfer_config=outer) as engine:
        entry = prompt(260, 900)
        engine.generate([entry])
        answer = engine.generate([entry])
        assert (answer["cached"], answer["tokens"]) == ([expected_hit(900)], plain.tokens([entry]))
        assert engine.log.count("under MultiConnector vLLM reads its own kv_load_failure_policy") == 1
