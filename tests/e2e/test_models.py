"""Other shapes of KV: two ranks, one latent vector, eight bits. The same promise for each."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from conftest import Plain, expected_hit, num_objects, prompt, wait_for
from engine import Engine, Server
from models import make_model

ALONE = {"enable_prefix_caching": False}


def two_ranks() -> dict[str, Any]:
    """Settings of an engine of two workers."""
    cpus = sorted(os.sched_getaffinity(0))
    binding = f"{cpus[0]}|{cpus[-1]}"  # on one NUMA node vLLM wants to be told which core each rank may use
    return {"tensor_parallel_size": 2, "environment": {"VLLM_CPU_OMP_THREADS_BIND": binding}}


def test_two_ranks_load_and_store_their_halves(tiny: Path, server: Server, logs: Path, plain: Plain) -> None:
    prompts = [prompt(300, 1500), prompt(301, 700)]
    with Engine(tiny, logs, server.port, **two_ranks(), **ALONE) as engine:
        cold = engine.generate(prompts)
        # Scheduler and workers are processes of their own here, so the last stores end after the answer.
        wait_for(lambda: num_objects(server) == 7, "all chunks are stored by both ranks")
        warm = engine.generate(prompts)
        workers = server.status()["cache_context_meta"].values()
        assert sorted(worker["rank"] for worker in workers) == [0, 1]
    assert cold["cached"] == [0, 0]
    assert warm["cached"] == [expected_hit(1500), expected_hit(700)]
    assert cold["tokens"] == warm["tokens"] == plain.tokens(prompts)


def test_multi_head_latent_attention(models: Path, server: Server, logs: Path) -> None:
    """vLLM's latent attention on a CPU computes a token differently in a prefill and in a decode (plain vLLM, float32:
    other tokens), so what a hit is compared with is plain vLLM decoding behind the same prefilled tokens."""
    folder = make_model(models / "tiny-deepseek-mla", "tiny-deepseek-mla")
    latent = {"attention_backend": "CPU_MLA", **ALONE}  # with AMX vLLM prefers a backend that takes no float32
    prompts = [prompt(310, 1536), prompt(311, 512)]
    with Engine(folder, logs, **latent) as engine:
        expected = [engine.generate([entry])["tokens"][0] for entry in prompts]
    with Engine(folder, logs, server.port, **latent) as engine:
        for entry, tokens in zip(prompts, expected, strict=True):
            cold = engine.generate([entry])
            assert (cold["cached"], cold["tokens"]) == ([0], [tokens])
            warm = engine.generate([[*entry, tokens[0]]], max_tokens=15)
            assert (warm["cached"], warm["tokens"]) == ([len(entry)], [tokens[1:]])


def test_ranks_that_hold_the_same_latent_vectors_keep_them_once(models: Path, logs: Path) -> None:
    """Under tensor parallelism every rank has all of a latent entry: one writes it, and each of them loads it."""
    folder = make_model(models / "tiny-deepseek-mla", "tiny-deepseek-mla")
    latent = {"attention_backend": "CPU_MLA", **two_ranks(), **ALONE}
    entry = prompt(312, 1536)
    with Engine(folder, logs, **latent) as engine:
        expected = engine.generate([entry])["tokens"][0]
    with Server(logs) as server, Engine(folder, logs, server.port, **latent) as engine:
        cold = engine.generate([entry])
        wait_for(lambda: num_objects(server) == 6, "all chunks are stored")
        workers = list(server.status()["cache_context_meta"].values())
        assert [(worker["world_size"], worker["rank"]) for worker in workers] == [(1, 0), (1, 0)]
        used_bytes = server.status()["storage_manager"]["l1_manager"]["memory_used_bytes"]
        assert used_bytes == 1536 * workers[0]["kv_cache_layout"]["cache_size_per_token"]
        warm = engine.generate([[*entry, expected[0]]], max_tokens=15)
    assert (cold["cached"], cold["tokens"]) == ([0], [expected])
    assert (warm["cached"], warm["tokens"]) == ([1536], [expected[1:]])


def test_eight_bit_kv_is_its_own_kind(tiny: Path, server: Server, logs: Path, engine: Engine) -> None:
    entry = prompt(320, 1500)
    engine.generate([entry])  # float32, under the same model name
    with Engine(tiny, logs, kv_cache_dtype="fp8", **ALONE) as plain:
        expected = plain.generate([entry])["tokens"]
    with Engine(tiny, logs, server.port, kv_cache_dtype="fp8", **ALONE) as eight:
        cold, warm = eight.generate([entry]), eight.generate([entry])
    assert (cold["cached"], warm["cached"]) == ([0], [expected_hit(1500)])
    assert cold["tokens"] == warm["tokens"] == expected
