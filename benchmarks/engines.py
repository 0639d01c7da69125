"""Stock ``vllm serve`` under measurement."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import common

ANSWER_S = 180.0
EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "vllm_cpu"


def small_model(folder: Path) -> Path:
    """The small model of examples/vllm_cpu, made in ``folder`` by a process of its own, unless it is there already."""
    command = [sys.executable, str(EXAMPLES / "models.py"), "small-llama", str(folder)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return folder


def environment() -> dict[str, str]:
    """vLLM binds its threads itself (OMP_NUM_THREADS breaks that), and must not look for a network.

    It leaves one core free for itself and one more for any connector, and gives both back where that leaves nothing:
    on two cores an engine with a connector would compute on both and a plain one on one. Here all leave one free.
    """
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "PYTHONPATH")}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    return {**kept, **quiet, "LMCACHE_TRACK_USAGE": "false", "VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}


def transfer_config(port: int, **settings: Any) -> list[str]:
    """The options that connect vLLM to a cache server; the same for ours and the upstream one.

    ``settings``: more of ``lmcache.mp.*``.
    """
    extra = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
    extra |= {f"lmcache.mp.{name}": value for name, value in settings.items()}
    config = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return ["--no-enable-prefix-caching", "--kv-transfer-config", json.dumps(config)]


@dataclass(frozen=True)
class First:
    """One request: seconds to the first token, all the text, prompt tokens that were not computed."""

    ttft_s: float
    words: str
    cached: int


class VLLM:
    """``vllm serve`` on a free port of the loopback, spawned at once and waited for when entered."""

    def __init__(self, python: str, model: Path, log: Path, options: list[str]) -> None:
        self.port = common.free_port()
        command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
        command += ["--max-model-len", "8192", "--max-num-seqs", "8", "--enable-prompt-tokens-details", *options]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment(), cwd=log.parent)
        self._log = log

    def first(self, prompt: list[int]) -> First:
        """Stream a greedy completion of two tokens.

        Raises:
            RuntimeError: the answer is an error.
        """
        document: dict[str, Any] = {"model": "m", "prompt": prompt, "max_tokens": 2, "temperature": 0.0}
        document |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_S)
        start = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(document), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        ttft_s, words, cached = 0.0, [], 0
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            ttft_s = ttft_s or time.perf_counter() - start
            event = json.loads(line[6:])
            words += [choice["text"] for choice in event.get("choices", ())]
            cached = ((event.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens") or cached
        connection.close()
        if reply.status != http.client.OK or not words:
            raise RuntimeError(f"vLLM answered {reply.status}")
        return First(ttft_s, "".join(words), cached)

    def __enter__(self) -> Self:
        common.wait_for(f"http://127.0.0.1:{self.port}/health", self.process, self._log, pause_s=0.2)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        common.stop(self.process)
