"""What a user gets: the same output, sooner. Every hit is counted, by vLLM and by the server."""

from __future__ import annotations

from pathlib import Path

from conftest import CHUNK, Plain, expected_hit, num_objects, prompt, wait_for
from engine import Engine, Server

HITS = "lmcache_mp_lookup_hit_tokens_total"


def test_a_repeated_prompt_is_loaded_and_answered_alike(engine: Engine, server: Server, plain: Plain) -> None:
    prompts = [prompt(1, 1500), prompt(2, 1024), prompt(3, 200)]
    cold = engine.generate(prompts)
    assert cold["cached"] == [0, 0, 0]
    before = server.counter(HITS)
    warm = engine.generate(prompts)
    assert warm["cached"] == [1280, 1023, 0]
    assert server.counter(HITS) - before == 1280 + 1024
    assert cold["tokens"] == warm["tokens"] == plain.tokens(prompts)


def test_a_prefix_shared_partly_is_loaded_as_far_as_it_goes(engine: Engine, plain: Plain) -> None:
    base = prompt(4, 1300)
    engine.generate([base])
    variants = [base[:700] + prompt(5, 500), base[:256] + prompt(6, 300), base[:255] + prompt(7, 300)]
    answer = engine.generate(variants)
    assert answer["cached"] == [512, 256, 0]
    assert answer["tokens"] == plain.tokens(variants)


def test_generated_tokens_are_stored_like_those_of_the_prompt(engine: Engine, plain: Plain) -> None:
    start = prompt(8, 240)
    first = engine.generate([start], max_tokens=40)["tokens"][0]
    follow_up = start + first + prompt(9, 50)
    answer = engine.generate([follow_up])
    assert answer["cached"] == [CHUNK]
    assert answer["tokens"] == plain.tokens([follow_up])


def test_another_salt_sees_nothing(engine: Engine, plain: Plain) -> None:
    entry = prompt(10, 800)
    assert engine.generate([entry], salt="alice")["cached"] == [0]
    for salt, hit in (("bob", 0), (None, 0), ("alice", 768)):
        answer = engine.generate([entry], salt=salt)
        assert answer["cached"] == [hit], salt
        assert answer["tokens"] == plain.tokens([entry])


def test_vllm_restarted_and_a_second_instance_find_what_the_first_stored(
    engine: Engine, server: Server, tiny: Path, logs: Path, plain: Plain
) -> None:
    entry = prompt(11, 1100)
    engine.generate([entry])
    with Engine(tiny, logs, server.port, enable_prefix_caching=True) as second:
        answer = second.generate([entry])
        assert answer["cached"] == [expected_hit(1100)]
        # vLLM's own prefix cache is on here: what it holds is not asked for again, what lies beyond it is.
        longer = entry + prompt(12, 600)
        engine.generate([longer])
        assert second.generate([longer])["cached"] == [expected_hit(1700)]
        assert second.generate([longer])["tokens"] == plain.tokens([longer])
    assert answer["tokens"] == plain.tokens([entry])


def test_many_prompts_at_once_under_block_pressure(tiny: Path, server: Server, logs: Path, plain: Plain) -> None:
    shared = prompt(20, 640)
    prompts = [shared + prompt(21 + index, 200 + 40 * index) for index in range(12)]
    expected = plain.tokens(prompts, max_tokens=80)
    pressed = {"num_gpu_blocks_override": 40, "max_num_batched_tokens": 512, "max_model_len": 4096}
    with Engine(tiny, logs, server.port, enable_prefix_caching=True, **pressed) as engine:
        for _ in range(3):
            assert engine.generate(prompts, max_tokens=80)["tokens"] == expected
        assert engine.call("preemptions")["preemptions"] > 0
    assert server.status()["quarantined_count"] == 0
    wait_for(lambda: server.status()["active_sessions"] == 0, "all leases and reservations are given back")


def test_forgetting_externally_makes_the_engine_another(engine: Engine, server: Server) -> None:
    entry = prompt(40, 600)
    engine.generate([entry])
    held = num_objects(server)
    assert engine.call("reset", external=True)["reset"]
    assert engine.generate([entry])["cached"] == [0]
    assert num_objects(server) == held + 2
    assert engine.generate([entry])["cached"] == [512]
