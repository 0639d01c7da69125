"""An unmodified vLLM in a process of its own, driven by JSON lines on stdin; answers on stdout. See ``engine.Engine``.

Run in-process (one process for scheduler and worker) unless the job asks for several ranks. Nothing of vLLM is
patched: the connector is found by name, as a user's would be.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Serve jobs until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM prints to stdout; the answers must stand alone
    settings = json.loads(sys.stdin.readline())
    from vllm import LLM

    llm = LLM(**settings)
    _answer(answers, {"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        try:
            _answer(answers, _JOBS[job.pop("op")](llm, **job))
        except Exception as error:
            _answer(answers, {"error": f"{type(error).__name__}: {error}"})
    del llm


def _answer(stream: Any, document: dict[str, Any]) -> None:
    stream.write(json.dumps(document) + "\n")
    stream.flush()


def _prompt(entry: Any, salt: str | None) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": entry}
    if salt is not None:
        prompt["cache_salt"] = salt
    return prompt


def generate(llm: Any, prompts: list[list[int]], max_tokens: int, salt: str | None = None) -> dict[str, Any]:
    """Greedy decoding of all prompts together."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    start = time.monotonic()
    outputs = llm.generate([_prompt(p, salt) for p in prompts], greedy, use_tqdm=False)
    seconds = time.monotonic() - start
    _drain(llm)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens or 0 for output in outputs],
        "finish": [output.outputs[0].finish_reason for output in outputs],
        "seconds": seconds,
    }


def _drain(llm: Any) -> int:
    """Step until finished requests whose blocks wait for a store are gone, as vLLM's own server loop does."""
    core = getattr(llm.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return 0  # scheduler and loop are in a process of their own
    deadline = time.monotonic() + 30
    while core.scheduler.has_requests() and time.monotonic() < deadline:
        llm.llm_engine.step()
    return len(core.scheduler.requests)


def abort_after(llm: Any, prompt: list[int], steps: int) -> dict[str, Any]:
    """Add a request, make ``steps`` engine steps, abort it, and step until the engine has nothing left to do."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    engine.add_request("to-abort", {"prompt_token_ids": prompt}, SamplingParams(temperature=0.0, max_tokens=64))
    for _ in range(steps):
        engine.step()
    engine.abort_request(["to-abort"])
    return {"left": _drain(llm)}


def preemptions(llm: Any) -> dict[str, Any]:
    """How often requests were preempted so far, from vLLM's own metrics."""
    total = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    return {"preemptions": total}


def reset(llm: Any, external: bool = False) -> dict[str, Any]:
    """Forget vLLM's own prefix cache, and with ``external`` the connector's."""
    return {"reset": llm.llm_engine.reset_prefix_cache(reset_connector=external)}


def hold(_: Any, point: str, path: str) -> dict[str, Any]:
    """From now on every copy in direction ``point`` ("store" or "retrieve") waits, before it begins, until the file at
    ``path`` is gone; ``path + ".reached"`` appears when one waits. The copy itself stays the real one."""
    from lmcache.transfer.plan import CopyEngine

    real = getattr(CopyEngine, point)

    def held(*arguments: Any) -> Any:
        if os.path.exists(path):
            open(path + ".reached", "w").close()
        while os.path.exists(path):
            time.sleep(0.005)
        return real(*arguments)

    setattr(CopyEngine, point, held)
    return {"held": point}


def load_failure_policy(llm: Any) -> dict[str, Any]:
    """What vLLM's scheduler does with a request whose load failed."""
    return {"recompute": llm.llm_engine.engine_core.engine_core.scheduler.recompute_kv_load_failures}


def counters(_: Any) -> dict[str, Any]:
    """What became of the chunks that this worker stored and loaded."""
    import dataclasses

    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return dataclasses.asdict(get_kv_transfer_group()._worker._copier.counters)


def lose_worker(_: Any) -> dict[str, Any]:
    """From now on the worker is attached to nothing, while the scheduler still is."""
    from types import SimpleNamespace

    from vllm.distributed.kv_transfer import get_kv_transfer_group

    copier = get_kv_transfer_group()._worker._copier
    copier._link = SimpleNamespace(line=None, close=copier._link.close)
    return {"lost": True}


_JOBS = {
    f.__name__: f for f in (generate, abort_after, preemptions, reset, hold, load_failure_policy, counters, lose_worker)
}

if __name__ == "__main__":
    main()
