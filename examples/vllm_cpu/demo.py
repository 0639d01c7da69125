"""The main job, end to end, as a user would do it: `lmcache server`, an unmodified `vllm serve`, one long prompt asked
again.

Everything runs on the CPU and on the loopback. The model is made on the spot (random weights, see models.py), so what
it answers is no sense, but that it answers the same with and without the cache is the point, and so is the time to the
first token. Exit 1 when an answer differs or nothing was reused.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from models import corpus, make_model

PROMPT_TOKENS = 4096
START_S = 300


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(name: str, command: list[str], health: str, log: Path) -> subprocess.Popen[bytes]:
    """Start a program and wait until its health address answers."""
    print(f"$ {' '.join(command)}", flush=True)
    began = time.monotonic()
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    environment |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, process_group=0)
    while time.monotonic() - began < START_S:
        if process.poll() is not None:
            sys.exit(f"{name} ended at once; its log:\n{log.read_text()[-4000:]}")
        try:
            urllib.request.urlopen(health, timeout=2).close()
        except OSError:
            time.sleep(0.05)
            continue
        print(f"  {name} is healthy after {time.monotonic() - began:.1f} s", flush=True)
        return process
    stop(process)
    sys.exit(f"{name} did not become healthy; its log:\n{log.read_text()[-4000:]}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a program as a user would, and its family if it does not follow."""
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


class Engine:
    """Stock `vllm serve`, with the cache named by vLLM's own switch."""

    def __init__(self, model: Path, rpc_port: int | None, log: Path) -> None:
        self._port = free_port()
        # vLLM's own prefix cache is off, so that every reused token came through the server.
        switches = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "8192", "--no-enable-prefix-caching"]
        if rpc_port is not None:
            where = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": rpc_port}
            connector = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_connector_extra_config": where}
            switches += ["--kv-transfer-config", json.dumps(connector)]
        vllm = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--served-model-name", "demo"]
        address = ["--host", "127.0.0.1", "--port", str(self._port), "--enable-prompt-tokens-details"]
        self.process = start("vllm", [*vllm, *address, *switches], f"http://127.0.0.1:{self._port}/health", log)

    def ask(self, tokens: list[int]) -> tuple[float, int, str]:
        """Time to first token in ms, reused prompt tokens, text."""
        body = {
            "model": "demo",
            "prompt": tokens,
            "max_tokens": 24,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        address = f"http://127.0.0.1:{self._port}/v1/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        began, first, text, reused = time.monotonic(), 0.0, "", 0
        with urllib.request.urlopen(request, timeout=300) as stream:
            for line in stream:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if event["choices"] and event["choices"][0]["text"]:
                    first = first or time.monotonic() - began
                    text += event["choices"][0]["text"]
                if event.get("usage"):
                    reused = int((event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        return first * 1000, reused, text


def show(what: str, answer: tuple[float, int, str]) -> None:
    """One line of the result."""
    print(f"  {what:34} {answer[0]:9.1f} ms to the first token, {answer[1]:5} of {PROMPT_TOKENS} tokens reused")


def main() -> None:
    """Run it all in a folder of its own, and leave nothing running."""
    folder = Path(tempfile.mkdtemp(prefix="lmcache-demo-"))
    model = make_model(folder / "small-llama", "small-llama")
    from tokenizers import Tokenizer

    text = "\n".join(corpus())
    tokens = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text).ids
    prompts = [tokens[start : start + PROMPT_TOKENS] for start in (0, len(tokens) // 2)]
    print(f"logs and model: {folder}\nprompts: {PROMPT_TOKENS} tokens of this repository's text each\n")
    rpc_port, http_port = free_port(), free_port()
    lmcache = [sys.executable, "-m", "lmcache_cli"]
    switches = ["server", "--port", str(rpc_port), "--http-port", str(http_port), "--l1-size-gb", "1"]
    url = f"http://127.0.0.1:{http_port}"
    server = start("lmcache server", [*lmcache, *switches], f"{url}/healthcheck", folder / "server.log")
    running = [server]
    try:
        plain = Engine(model, None, folder / "vllm-plain.log")
        running.append(plain.process)
        expected = [plain.ask(prompt) for prompt in prompts]
        stop(plain.process)
        first = Engine(model, rpc_port, folder / "vllm-first.log")
        running.append(first.process)
        cold, warm = [first.ask(prompt) for prompt in prompts], [first.ask(prompt) for prompt in prompts]
        describe = [*lmcache, "describe", "kvcache", "--url", url]
        print(f"$ lmcache {' '.join(describe[3:])}\n{subprocess.run(describe, capture_output=True, text=True).stdout}")
        stop(first.process)
        second = Engine(model, rpc_port, folder / "vllm-second.log")
        running.append(second.process)
        restarted = [second.ask(prompt) for prompt in prompts]
    finally:
        for process in reversed(running):
            if process.poll() is None:
                stop(process)
    print()
    rounds = {"vLLM alone": expected, "with the cache, first time": cold, "again": warm, "vLLM restarted": restarted}
    for number in range(len(prompts)):
        for what, answers in rounds.items():
            show(f"prompt {number + 1}, {what}", answers[number])
    same = all([answer[2] for answer in answers] == [answer[2] for answer in expected] for answers in rounds.values())
    hits = all(answer[1] == PROMPT_TOKENS - 1 for answer in (*warm, *restarted))
    print(f"\nall answers equal: {same}; every repeated prompt reused: {hits}")
    sys.exit(0 if same and hits else 1)


if __name__ == "__main__":
    main()
