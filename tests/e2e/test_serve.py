"""The user's own way in: `vllm serve` with vLLM's flag and nothing else, asked over HTTP."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import expected_hit, num_objects, prompt, wait_for
from engine import START_S, Server, free_port, vllm_environment


class Serving:
    """`vllm serve` on a free port, with the switches a user would type."""

    def __init__(self, model: Path, folder: Path, *switches: str) -> None:
        self.port = free_port()
        self._log = folder / f"serve-{self.port}.log"
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--host", "127.0.0.1"]
        fixed = ["--port", str(self.port), "--served-model-name", "m", "--dtype", "float32", "--enforce-eager"]
        small = ["--max-model-len", "8192", "--max-num-seqs", "8", "--enable-prompt-tokens-details"]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *fixed, *small, *switches], stdout=log, stderr=log, env=vllm_environment({}), process_group=0
            )
        wait_for(self._healthy, "vllm serve becomes healthy", START_S)

    def _healthy(self) -> bool:
        assert self.process.poll() is None, self.log[-4000:]
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2).close()
        except OSError:
            return False
        return True

    def complete(self, tokens: list[int]) -> tuple[str, int]:
        """Text and cached tokens of a greedy completion."""
        body = {"model": "m", "prompt": tokens, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as reply:
            answer: dict[str, Any] = json.loads(reply.read())
        details = answer["usage"]["prompt_tokens_details"] or {}
        return answer["choices"][0]["text"], int(details.get("cached_tokens") or 0)

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text(errors="replace")

    def close(self) -> None:
        """SIGTERM, as a user would."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)


DEFAULT_PORT = 5555
FORMS = {
    "flag": ["--kv-offloading-backend", "lmcache", "--kv-offloading-size", "2"],
    "name": ["--kv-transfer-config", '{"kv_connector":"LMCacheMPConnector","kv_role":"kv_both"}'],
}


@pytest.mark.parametrize("form", sorted(FORMS))
def test_vllm_serve_with_the_forms_that_need_no_address(form: str, tiny: Path, logs: Path) -> None:
    entry = prompt(400, 2000)
    with Server(logs, port=DEFAULT_PORT) as server:
        serving = Serving(tiny, logs, "--no-enable-prefix-caching", *FORMS[form])
        try:
            cold = serving.complete(entry)
            wait_for(lambda: num_objects(server) == 7, "the prompt is stored")
            before = server.counter("lmcache_mp_lookup_hit_tokens_total")
            warm = serving.complete(entry)
            assert server.counter("lmcache_mp_lookup_hit_tokens_total") - before == 7 * 256
            assert cold[1] == 0
            assert warm == (cold[0], expected_hit(2000))
            if form == "name":
                _survives_a_kill(serving, server, entry, cold[0])
        finally:
            serving.close()
        wait_for(lambda: server.status()["attached_processes"] == 0, "vLLM's processes have detached")


def _survives_a_kill(serving: Serving, server: Server, entry: list[int], text: str) -> None:
    server.kill()
    start = time.monotonic()
    assert serving.complete(entry) == (text, 0)
    server.start()
    wait_for(lambda: server.status()["attached_processes"] == 2, "scheduler and worker attach again")
    assert serving.complete(entry) == (text, expected_hit(2000))
    assert serving.process.poll() is None, f"vLLM ended after {time.monotonic() - start:.0f} s"
