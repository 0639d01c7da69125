"""transformers with us answers as without us, whatever is held, lost, slow or wrong."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import CHUNK, greedy, make_model, prompt
from server_running import Server, eventually, free_ports, running
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lmcache.connectors.transformers import KVCacheSession
from lmcache.connectors.transformers.session import parse_address
from lmcache.errors import ConfigError
from lmcache.transfer.plan import CopyEngine

Expected = Callable[[list[int]], list[int]]
EXTENT_BYTES = CHUNK * 2 * 2 * 2 * 32 * 4  # tokens, layers, K and V, heads, head size, float32
HANG_S = 30.0


def ask(session: KVCacheSession, model: Any, tokens: list[int], salt: str = "") -> tuple[int, list[int]]:
    """Tokens that were reused, and the answer; everything is stored afterwards."""
    cache, held = session.load(tokens, salt)
    answer = greedy(model, tokens, cache, held)
    session.store(tokens + answer, cache, salt)
    return held, answer


def flip(server: Server, extent: int) -> None:
    """Bit rot: invert one byte of the pool's extent that holds something, by number."""
    with open(f"{server.pool_folder}/pool", "r+b", buffering=0) as pool:
        at = extent * EXTENT_BYTES + EXTENT_BYTES // 2
        byte = os.pread(pool.fileno(), 1, at)
        os.pwrite(pool.fileno(), bytes([byte[0] ^ 0x10]), at)


@pytest.mark.parametrize("num_tokens", [200, 256, 257, 1024, 1100])
def test_a_prompt_asked_again_is_reused_up_to_its_last_whole_chunk_and_answered_the_same(
    model: Any, shared: Server, expected: Expected, num_tokens: int
) -> None:
    tokens = prompt(num_tokens, num_tokens)
    with KVCacheSession(model, shared.rpc) as session:
        assert ask(session, model, tokens) == (0, expected(tokens))
        assert ask(session, model, tokens) == (min(num_tokens // CHUNK * CHUNK, num_tokens - 1), expected(tokens))


def test_another_session_of_the_same_model_finds_what_the_first_stored(
    model: Any, shared: Server, expected: Expected
) -> None:
    tokens = prompt(1, 800)
    with KVCacheSession(model, shared.rpc) as session:
        ask(session, model, tokens)
    with KVCacheSession(make_model(), shared.rpc.removeprefix("tcp://")) as session:
        assert ask(session, model, tokens) == (768, expected(tokens))


def test_a_prompt_that_begins_the_same_reuses_the_common_chunks_only(
    model: Any, shared: Server, expected: Expected
) -> None:
    first = prompt(2, 900)
    second = first[:600] + prompt(3, 300)
    with KVCacheSession(model, shared.rpc) as session:
        ask(session, model, first)
        assert ask(session, model, second) == (512, expected(second))


def test_generated_tokens_are_reused_by_the_next_turn(model: Any, shared: Server, expected: Expected) -> None:
    tokens = prompt(4, CHUNK - 4)
    with KVCacheSession(model, shared.rpc) as session:
        _, answer = ask(session, model, tokens)
        turn = tokens + answer + prompt(5, 20)
        assert ask(session, model, turn) == (CHUNK, expected(turn))


def test_salts_share_nothing(model: Any, shared: Server, expected: Expected) -> None:
    tokens = prompt(6, 600)
    with KVCacheSession(model, shared.rpc) as session:
        assert [ask(session, model, tokens, salt) for salt in ("a", "b", "", "a")] == [
            (held, expected(tokens)) for held in (0, 0, 0, 512)
        ]


def test_generate_of_transformers_takes_our_cache(model: Any, shared: Server) -> None:
    tokens = prompt(7, 700)
    inputs = torch.tensor([tokens])
    options = {"max_new_tokens": 10, "do_sample": False}
    without = model.generate(inputs, **options)[0].tolist()
    with KVCacheSession(model, shared.rpc) as session:
        for held in (0, 512):
            cache, num_tokens = session.load(tokens)
            assert num_tokens == held
            output = model.generate(inputs, past_key_values=cache, **options)[0].tolist()
            assert output == without
            session.store(output, cache)


def test_beams_grow_from_a_loaded_cache(model: Any, shared: Server) -> None:
    tokens = prompt(8, 600)
    inputs = torch.tensor([tokens])
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    without = model.generate(inputs, **options)[0].tolist()
    with KVCacheSession(model, shared.rpc) as session:
        for expected_held in (0, 512):
            cache, held = session.load(tokens)
            assert held == expected_held
            if held:
                cache.batch_repeat_interleave(3)  # as transformers asks of any cache that is not empty
            assert model.generate(inputs, past_key_values=cache, **options)[0].tolist() == without
            ask(session, model, tokens)


def test_a_cache_made_by_transformers_is_stored(model: Any, shared: Server, expected: Expected) -> None:
    tokens = prompt(9, 600)
    stock = DynamicCache()
    greedy(model, tokens, stock, 0)
    with KVCacheSession(model, shared.rpc) as session:
        assert session.store(tokens, stock) == 512
        assert ask(session, model, tokens) == (512, expected(tokens))


def test_one_cache_is_filled_again_and_again(model: Any, shared: Server, expected: Expected) -> None:
    prompts = [prompt(10, 600), prompt(11, 300), prompt(12, 1300)]
    with KVCacheSession(model, shared.rpc) as session:
        cache: Any = session.new_cache(512)  # too small for two of them
        for held in ((0, 0, 0), (512, 256, 1280)):
            for tokens, num_tokens in zip(prompts, held, strict=True):
                cache, found = session.load(tokens, cache=cache)
                assert (found, greedy(model, tokens, cache, found)) == (num_tokens, expected(tokens))
                session.store(tokens, cache)


def test_other_weights_or_another_type_find_nothing(model: Any, shared: Server) -> None:
    tokens = prompt(13, 600)
    with KVCacheSession(model, shared.rpc) as session:
        ask(session, model, tokens)
        assert session.load(tokens)[1] == 512
    edited = make_model()
    with torch.no_grad():
        edited.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    for other in (make_model(seed=1), make_model().to(torch.bfloat16), edited, make_model(rms_norm_eps=1e-5)):
        with KVCacheSession(other, shared.rpc) as session:
            assert session.load(tokens)[1] == 0


def test_no_server_means_no_reuse_and_the_same_answer(model: Any, expected: Expected) -> None:
    tokens = prompt(14, 600)
    for address in (None, f"127.0.0.1:{free_ports()[0]}"):
        with KVCacheSession(model, address) as session:
            assert [ask(session, model, tokens) for _ in range(2)] == [(0, expected(tokens))] * 2
            assert not session.attached


def test_a_server_killed_between_store_and_load_is_done_without_and_found_again(
    model: Any, own: Server, expected: Expected
) -> None:
    tokens = prompt(15, 600)
    with KVCacheSession(model, own.rpc) as session:
        ask(session, model, tokens)
        own.kill()
        assert ask(session, model, tokens) == (0, expected(tokens))
        own.start()
        eventually(lambda: own.status()["attached_processes"] == 2, "both halves attach again")
        eventually(lambda: session.load(tokens)[1] == 512, "what was committed is found again")
        assert ask(session, model, tokens) == (512, expected(tokens))


def test_a_stopped_server_is_not_waited_for(model: Any, own: Server, expected: Expected) -> None:
    tokens = prompt(16, 600)
    with KVCacheSession(model, own.rpc) as session:
        ask(session, model, tokens)
        own.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        try:
            assert [ask(session, model, tokens) for _ in range(3)] == [(0, expected(tokens))] * 3
            assert time.monotonic() - began < HANG_S
        finally:
            own.process.send_signal(signal.SIGCONT)
        eventually(lambda: session.load(tokens)[1] == 512, "the server is used again")


def test_wrong_bytes_are_a_miss_from_there_on_and_are_reported(model: Any, own: Server, expected: Expected) -> None:
    tokens = prompt(17, 5 * CHUNK + 40)
    with KVCacheSession(model, own.rpc) as session:
        ask(session, model, tokens)
        flip(own, extent=2)
        held, answer = ask(session, model, tokens)
        assert answer == expected(tokens)
        assert held < 5 * CHUNK
        assert held % CHUNK == 0
        assert session.totals.failed_chunks == 1
        eventually(lambda: own.status()["quarantined_count"] == 1, "the object is taken out")
        assert ask(session, model, tokens) == (5 * CHUNK, expected(tokens))


def test_a_full_server_refuses_and_the_answer_is_the_same(model: Any, own: Server, expected: Expected) -> None:
    capacity_tokens = own.l1()["memory_total_bytes"] // EXTENT_BYTES * CHUNK
    tokens = prompt(18, 4000)
    assert capacity_tokens > len(tokens)
    with KVCacheSession(model, own.rpc) as session:
        for seed in range(capacity_tokens // 8000 + 2):
            filler = prompt(100 + seed, 8000)
            cache, held = session.load(filler)
            greedy(model, filler, cache, held, max_tokens=1)
            session.store(filler, cache)
        assert ask(session, model, tokens)[1] == expected(tokens)
        assert ask(session, model, tokens) == (3840, expected(tokens))


@pytest.fixture
def latch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], threading.Event]]:
    """Let the copies of one direction wait, before they begin, until the event is set; the copy itself stays real."""
    events: list[threading.Event] = []

    def hold(direction: str) -> threading.Event:
        real, event = getattr(CopyEngine, direction), threading.Event()

        def held(*arguments: Any) -> Any:
            assert event.wait(HANG_S)
            return real(*arguments)

        monkeypatch.setattr(CopyEngine, direction, held)
        events.append(event)
        return event

    monkeypatch.setattr("lmcache.connectors.transformers.session.BUDGET_S", 0.3)
    yield hold
    for event in events:
        event.set()


def test_a_load_that_takes_too_long_is_done_without_and_harms_nobody(
    model: Any, own: Server, expected: Expected, latch: Callable[[str], threading.Event]
) -> None:
    tokens, other = prompt(30, 600), prompt(31, 600)
    with KVCacheSession(model, own.rpc) as session:
        cache: Any = session.new_cache(1024)
        ask(session, model, tokens)
        event = latch("retrieve")
        given, held = session.load(tokens, cache=cache)
        assert held == 0
        assert given is not cache  # that one is still to be written to
        assert greedy(model, other, given, 0) == expected(other)
        event.set()
        eventually(lambda: session.load(tokens, cache=given)[1] == 512, "loads work again")
        assert ask(session, model, tokens) == (512, expected(tokens))
        eventually(lambda: own.status()["active_sessions"] == 0, "every lease is given back")


def test_a_store_that_takes_too_long_is_never_published(
    model: Any, own: Server, expected: Expected, latch: Callable[[str], threading.Event]
) -> None:
    tokens = prompt(32, 600)
    with KVCacheSession(model, own.rpc) as session:
        event = latch("store")
        cache: Any = session.new_cache(1024)
        greedy(model, tokens, cache, 0)
        assert session.store(tokens, cache) == 0
        for layer in cache.layers:  # what the copy will read is no longer what was to be stored
            layer.key_room.fill_(float("nan"))
        event.set()
        eventually(lambda: own.metric("aborts_total") == 1, "the reservation is given back")
        assert own.l1()["total_object_count"] == 0
        assert ask(session, model, tokens) == (0, expected(tokens))
        assert ask(session, model, tokens) == (512, expected(tokens))


def test_a_server_of_another_chunk_size_takes_over(model: Any, own: Server, expected: Expected) -> None:
    tokens = prompt(33, 600)
    with KVCacheSession(model, own.rpc) as session:
        assert ask(session, model, tokens) == (0, expected(tokens))
        own.stop()
        own.options += ["--chunk-size", "128"]
        own.start()
        eventually(lambda: own.status()["attached_processes"] == 2, "both halves attach again")
        assert ask(session, model, tokens) == (0, expected(tokens))
        assert ask(session, model, tokens) == (512, expected(tokens))
        assert own.l1()["total_object_count"] == 4


def test_a_chunk_that_does_not_fit_is_said_and_not_used(
    model: Any, tmp_path: Any, expected: Expected, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = prompt(19, 600)
    with running(str(tmp_path), "--chunk-size", "100") as server, KVCacheSession(model, server.rpc) as session:
        assert [ask(session, model, tokens) for _ in range(2)] == [(0, expected(tokens))] * 2
    assert "--chunk-size 112" in caplog.text


def other_model(kind: str) -> Any:
    """A small model of another architecture, type of numbers or way to compute attention."""
    torch.manual_seed(0)
    common = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    tokens = {"eos_token_id": None, "bos_token_id": None}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    if kind == "latent attention":  # its K and V have different sizes
        latent = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8}
        experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        groups = {"first_k_dense_replace": 2, "n_group": 1, "topk_group": 1}
        heads["num_key_value_heads"] = 4
        config = DeepseekV2Config(**common, **tokens, **heads, **latent, **experts, **groups, v_head_dim=32)
        return DeepseekV2ForCausalLM(config).eval()
    if kind == "biased projections":
        return Qwen2ForCausalLM(Qwen2Config(**common, **tokens, **heads)).eval()
    if kind == "learned positions":
        return GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=4, **tokens)).eval()
    made = make_model(attn_implementation="eager") if kind == "eager" else make_model()
    return made.to(torch.bfloat16) if kind == "bfloat16" else made


@pytest.mark.parametrize("kind", ["latent attention", "biased projections", "learned positions", "eager", "bfloat16"])
def test_any_plain_attention_is_reused(shared: Server, kind: str) -> None:
    model = other_model(kind)
    tokens = prompt(40, 800)
    without = greedy(model, tokens, DynamicCache(), 0)
    with KVCacheSession(model, shared.rpc) as session:
        assert [ask(session, model, tokens) for _ in range(2)] == [(0, without), (768, without)]


def test_a_model_in_training_mode_is_not_cached(shared: Server, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model().train()
    tokens = prompt(41, 600)
    with KVCacheSession(model, shared.rpc) as session:
        assert [ask(session, model, tokens)[0] for _ in range(2)] == [0, 0]
    assert "model.eval()" in caplog.text


def test_a_sliding_window_is_not_cached_and_answers_all_the_same(
    shared: Server, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=128, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    tokens = prompt(20, 600)
    without = greedy(model, tokens, DynamicCache(config=config), 0)
    with KVCacheSession(model, shared.rpc) as session:
        assert [ask(session, model, tokens) for _ in range(2)] == [(0, without)] * 2
    assert "does not cache this model" in caplog.text


def test_a_rotary_embedding_that_depends_on_the_length_is_not_cached(
    shared: Server, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    tokens = prompt(21, 600)
    with KVCacheSession(model, shared.rpc) as session:
        assert [ask(session, model, tokens)[0] for _ in range(2)] == [0, 0]
    assert "depends on how long" in caplog.text


@pytest.mark.parametrize(
    "text", ["", "5555", "host", "host:", ":5555", "host:0", "host:65536", "http://host:1", "h:1/x"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no address"):
        parse_address(text)
