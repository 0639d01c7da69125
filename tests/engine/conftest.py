"""A small model, servers as processes, and what the answers must be: the same model without us."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parents[1] / "server"), str(Path(__file__).parents[2] / "examples" / "vllm_cpu")]

from server_running import Server, running  # noqa: E402 - the path is set above

CHUNK = 256


def pytest_configure(config: pytest.Config) -> None:
    """What torch and transformers warn of at import is not ours to mend."""
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning"):
        config.addinivalue_line("filterwarnings", f"ignore::{kind}")


def prompt(seed: int, num_tokens: int) -> list[int]:
    """Random token ids, the same for the same seed; a longer one begins with the shorter."""
    numbers = random.Random(seed)
    return [numbers.randrange(256) for _ in range(num_tokens)]


def make_model(seed: int = 0, **settings: Any) -> Any:
    """Two layers of Llama whose attention is sharp: one wrong chunk changes what is generated."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    common = {"vocab_size": 256, "intermediate_size": 256, "max_position_embeddings": 8192, "eos_token_id": None}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**shape, **common, bos_token_id=None, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8.0)
            elif "v_proj" in name or "o_proj" in name or "lm_head" in name:
                parameter.mul_(4.0)
    return model


def greedy(model: Any, tokens: list[int], cache: Any, held: int, max_tokens: int = 12) -> list[int]:
    """Greedy continuation of ``tokens``, of which the cache holds the first ``held``."""
    import torch

    answer: list[int] = []
    with torch.inference_mode():
        rest = tokens[held:]
        for _ in range(max_tokens):
            logits = model(input_ids=torch.tensor([rest]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
            rest = [int(logits.argmax())]
            answer += rest
    return answer


@pytest.fixture(scope="session")
def model() -> Any:
    """The model of most tests."""
    return make_model()


@pytest.fixture(scope="session")
def expected(model: Any) -> Callable[[list[int]], list[int]]:
    """The answer of the same model without us."""
    from transformers import DynamicCache

    known: dict[tuple[int, ...], list[int]] = {}

    def answer(tokens: list[int]) -> list[int]:
        if tuple(tokens) not in known:
            known[tuple(tokens)] = greedy(model, tokens, DynamicCache(), 0)
        return known[tuple(tokens)]

    return answer


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that the tests of a module use together."""
    with running(str(tmp_path_factory.mktemp("server")), pool_gb=0.25) as server:
        yield server


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Server]:
    """A server that the test may kill."""
    with running(str(tmp_path), pool_gb=0.125) as server:
        yield server
