"""`lmcache verify engine` and `lmcache audit isolation` through stock `vllm serve` and through our own small engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import CHUNK, prompt, wait_for
from engine import START_S, Server, free_port, vllm_environment

from lmcache_cli.api import ClearRequest
from lmcache_cli.client import CacheServer
from lmcache_cli.target import Target
from lmcache_cli.verify.evidence import Holdings, Witness
from lmcache_cli.verify.greedy import GreedyEngine
from lmcache_cli.verify.run import Row, Verifier

COMMAND_S = 300
NAME = "served"


BAD_CHUNK = 2
LIE = f"""
from lmcache.transfer.plan import CopyEngine, Plan

honest = CopyEngine.retrieve


def retrieve(self, pool, plan, checksums, threads):
    failed = honest(self, pool, plan, checksums, threads)
    num = len(plan.offsets)
    if num > {BAD_CHUNK}:
        width = len(plan.blocks) // num
        blocks = plan.blocks[{BAD_CHUNK} * width : {BAD_CHUNK + 1} * width]
        part = Plan.of(plan.chunk_tokens, blocks, plan.offsets[:1], plan.seeds[:1])
        honest(self, pool, part, checksums[:1], threads)
    return failed


CopyEngine.retrieve = retrieve
"""
"""A fault behind every check: what is loaded as chunk 2 of a prompt are the good bytes of chunk 0."""


@contextmanager
def running(command: list[str], port: int, log: Path, more: dict[str, str] | None = None) -> Iterator[str]:
    """A serving engine as a process of its own; its address, once it is healthy."""
    with log.open("wb") as sink:
        environment = vllm_environment({"VLLM_SERVER_DEV_MODE": "1", **(more or {})})
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-4000:]
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(30)


def serve(tiny: Path, server: Server, port: int) -> list[str]:
    """Command of `vllm serve`, with its own prefix cache on, as users have it."""
    where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": server.port}
    connector = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": where}
    return [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(tiny), "--served-model-name", NAME),
        *("--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "8192", "--max-num-seqs", "4", "--enable-prompt-tokens-details"),
        *("--kv-transfer-config", json.dumps(connector)),
    ]


@pytest.fixture(scope="module")
def vllm(tiny: Path, logs: Path, server: Server) -> Iterator[str]:
    """Stock `vllm serve`."""
    port = free_port()
    with running(serve(tiny, server, port), port, logs / "vllm-serve.log") as url:
        yield url


def lmcache(*words: str) -> tuple[int, Any]:
    command = [sys.executable, "-m", "lmcache_cli", *words, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    return done.returncode, json.loads(done.stdout)


def where(engine_url: str, server: Server) -> tuple[str, ...]:
    return ("--engine-url", engine_url, "--lmcache-url", f"http://127.0.0.1:{server.http_port}")


def test_vllm_answers_the_same_from_our_cache(vllm: str, server: Server) -> None:
    status, document = lmcache("verify", "engine", *where(vllm, server), "--reset-prefix-cache")
    metrics = document["metrics"]
    assert (status, metrics["num_equal"], metrics["divergence_rate"]) == (0, metrics["num_prompts"], 0.0)
    assert metrics["logprob_difference_max"] < 1e-3
    for row in metrics["prompts"]:
        assert (row["source"], row["told_by"]) == ("lmcache", "engine metrics")
        chunks = row["prompt_tokens"] // CHUNK
        assert row["num_chunks_by_tier"] == {"l1": chunks}
        assert row["lmcache_tokens"] >= chunks * CHUNK - 1


def test_what_vllm_has_in_its_own_cache_proves_nothing_about_ours(vllm: str, server: Server) -> None:
    hits = server.counter("lmcache_mp_lookup_hit_tokens_total")
    status, document = lmcache("verify", "engine", *where(vllm, server), "--seed", "7", "--prompt", "{lmcache}")
    (row,) = document["metrics"]["prompts"]
    assert (status, document["error"]["code"], row["verdict"], row["source"]) == (
        1,
        "not_compared",
        "not_cached",
        "engine",
    )
    # the server granted a hit all the same: its counters alone would have told another story
    assert server.counter("lmcache_mp_lookup_hit_tokens_total") >= hits + row["num_chunks_by_tier"]["l1"] * CHUNK


def test_damage_that_the_check_finds_is_told_and_not_called_equal(vllm: str, server: Server) -> None:
    class Damaging(GreedyEngine):
        def reset_prefix_cache(self) -> None:
            super().reset_prefix_cache()
            server.flip_bytes(4096, 16)

    url = f"http://127.0.0.1:{server.http_port}"
    with Damaging(Target(vllm, 60.0)) as engine, CacheServer(Target(url)) as cache:
        verifier = Verifier(engine, Holdings(cache, url), Witness(engine, cache), NAME, 16, 0.1, CHUNK, resets=True)
        row = verifier.verify(prompt(900, 3 * CHUNK))
    assert row.verdict == "not_cached"
    assert row.reason is not None
    assert "failed the check" in row.reason
    assert row.cached is not None
    assert row.cached.pieces == row.computed[0].pieces


def test_a_lie_behind_every_check_is_found_with_its_chunk_and_tier(tiny: Path, logs: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(LIE)
    port = free_port()
    with (
        Server(logs, 0.5, "--l2-path", str(tmp_path / "l2"), "--l2-size-gb", "1") as tiered,
        running(serve(tiny, tiered, port), port, logs / "vllm-lying.log", {"PYTHONPATH": str(tmp_path)}) as url,
    ):
        status, document = lmcache("verify", "engine", *where(url, tiered), "--reset-prefix-cache")
        row = verified_below_l1(url, tiered, prompt(910, 6 * CHUNK + 9))
        (adapter,) = tiered.status()["storage_manager"]["l2_adapters"]
    metrics = document["metrics"]
    assert (status, document["error"]["code"]) == (1, "diverged")
    for entry in metrics["prompts"]:
        if entry["prompt_tokens"] // CHUNK > BAD_CHUNK:
            found = (entry["verdict"], entry["first_bad_chunk"], entry["first_bad_tier"], entry["is_stored_again_bad"])
            assert found == ("diverged", BAD_CHUNK, "l1", True)
        else:
            assert entry["verdict"] == "equal"
    assert (metrics["num_diverged"], metrics["num_equal"]) == (3, 2)
    assert row.verdict == "diverged"
    assert list(row.tiers) == [adapter["name"]] * 6
    assert row.narrowed is not None
    assert (row.narrowed.chunk, row.narrowed.tier) == (BAD_CHUNK, adapter["name"])


def verified_below_l1(engine_url: str, server: Server, tokens: list[int]) -> Row:
    """A prompt whose chunks have left L1 for the tier below before each request that shall use them."""
    url = f"http://127.0.0.1:{server.http_port}"

    class Clearing(GreedyEngine):
        def reset_prefix_cache(self) -> None:
            super().reset_prefix_cache()
            wait_for(lambda: server.counter("lmcache_mp_unwritten_chunks") == 0, "all chunks are written to the tier")
            cache.clear(ClearRequest())

    with Clearing(Target(engine_url, 60.0)) as engine, CacheServer(Target(url)) as cache:
        verifier = Verifier(engine, Holdings(cache, url), Witness(engine, cache), NAME, 16, 0.1, CHUNK, resets=True)
        return verifier.verify(tokens)


def test_tenants_of_vllm_are_kept_apart(vllm: str, server: Server) -> None:
    status, document = lmcache("audit", "isolation", *where(vllm, server), "--samples", "20")
    results = {check["name"]: (check["result"], check["detail"]) for check in document["metrics"]["checks"]}
    assert {name: result for name, (result, _) in results.items()} == {
        "same_salt_hits": "pass",
        "other_salt_misses": "pass",
        "other_salt_cannot_evict": "pass",
        "timing_not_separable": "pass",
    }, results
    assert status == 0
    assert json.loads(server.get("/quota")) == {"users": {}}


def test_our_own_engine_answers_the_same_from_our_cache(logs: Path, server: Server) -> None:
    port = free_port()
    command = [sys.executable, "-m", "lmcache_cli", "engine", "--port", str(port)]
    with running([*command, "--lmcache", f"tcp://127.0.0.1:{server.port}"], port, logs / "own-engine.log") as url:
        status, document = lmcache("verify", "engine", *where(url, server))
    assert (status, document["metrics"]["num_equal"]) == (0, document["metrics"]["num_prompts"])
    assert {row["source"] for row in document["metrics"]["prompts"]} == {"lmcache"}
