"""Time to first token of a long prompt on stock vLLM: computed, or from a cache: ours, upstream's, vLLM's own.

    python benchmarks/ttft.py [--json PATH] [--prompts 4] [--model FOLDER] [--upstream PYTHON]

Run it with the Python of an environment that has vLLM and this project. All engines are up at once and take turns,
prompt by prompt: cold, then warm three times; at the end ours is restarted and asked once more for every prompt.

    cold, warm   of a streamed completion over HTTP, 4,096 random token ids, one at a time, a small model in float32
    load         the verified copy of the same bytes out of a pool, alone: the same native call with as many threads,
                 in this process
    floor        on plain vLLM, whose own cache holds the 4,096 tokens in place: the same prompt and one token more, so
                 that HTTP, scheduling, a forward of one token and sampling are left
    one token    on plain vLLM, a prompt of one token: the least of the least

--upstream: the Python of an environment with the same vLLM and upstream's lmcache 0.5.6 (``scripts/peer_env.py``),
which then takes its turns in each of its modes for CPU engines. Ours checks every byte that it loads, upstream none.
All engines compute on one thread (see ``engines.environment``).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import random
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable
from pathlib import Path

import common
from common import Row
from engines import VLLM, First, small_model, transfer_config
from upstream import Upstream

from lmcache.connectors.copier import LOAD_THREADS
from lmcache.layout import LayerGroup, Layout, Plane
from lmcache.transfer import _native

PROMPT_TOKENS = 4096
L1_GB = 1.0
SETTLE_S, SETTLE_PICKLE_S = 0.5, 3.0
"""After a cold request: its store must have ended before the prompt is asked again."""

WARM = 3
MODES = {"shm": "engine_driven", "lmcache_driven": "lmcache_driven", "pickle": "engine_driven"}
"""Of upstream (``upstream.py``), with the connector's name for each."""

PLAIN, PICKLE = "vLLM", "upstream, pickle"

LAYERS, PAGE_BYTES, BLOCK_TOKENS, CHUNK_TOKENS = 8, 256 << 10, 128, 256
"""Small model: bytes of one block of one layer (128 tokens, K and V, 4 heads of 64 float32)."""

BOUND_RATIO, BOUND_BEYOND_LOAD_S = 0.1, 0.015


class Copy:
    """The bytes of one prompt in a pool and in an engine's memory, everything touched; ``seconds`` loads them once."""

    def __init__(self) -> None:
        blocks_per_chunk = CHUNK_TOKENS // BLOCK_TOKENS
        num_blocks = PROMPT_TOKENS // BLOCK_TOKENS
        num_chunks = num_blocks // blocks_per_chunk
        chunk_bytes = LAYERS * PAGE_BYTES * blocks_per_chunk
        total_bytes = num_chunks * chunk_bytes
        with tempfile.TemporaryFile(dir="/dev/shm") as file:
            file.truncate(total_bytes)
            self._pool = mmap.mmap(file.fileno(), total_bytes)
        self._engine = mmap.mmap(-1, total_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._engine.write(random.Random(0).randbytes(1 << 20) * (total_bytes >> 20))
        address = _address(self._engine)
        layer_bytes = PAGE_BYTES * num_blocks
        planes = tuple(Plane(address + layer * layer_bytes, PAGE_BYTES, (), PAGE_BYTES) for layer in range(LAYERS))
        layout = Layout((LayerGroup(planes, num_blocks, BLOCK_TOKENS),))
        self._planes, self._groups = layout.plane_table(), layout.group_table(CHUNK_TOKENS)
        self._blocks = _u64(range(num_blocks))
        self._offsets = _u64(index * chunk_bytes for index in range(num_chunks))
        self._seeds = _u64(range(num_chunks))
        self._checksums = _native.store(self._pool, *self._plan(), 1)

    def _plan(self) -> tuple[array[int], array[int], memoryview, memoryview, memoryview]:
        return self._planes, self._groups, self._blocks, self._offsets, self._seeds

    def seconds(self) -> float:
        """One load, verified."""
        start = time.perf_counter()
        verified = _native.retrieve(self._pool, *self._plan(), self._checksums, LOAD_THREADS)
        elapsed_s = time.perf_counter() - start
        if 0 in verified:
            raise RuntimeError("a chunk failed its check")
        return elapsed_s


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _u64(numbers: Iterable[int]) -> memoryview:
    return memoryview(array("Q", numbers))


def prompt(seed: int, num_tokens: int = PROMPT_TOKENS) -> list[int]:
    """Random token ids that no other seed shares a chunk with."""
    source = random.Random(f"prompt {seed}")  # Random(-1) is Random(1)
    return [source.randrange(2, 4000) for _ in range(num_tokens)]


Times = dict[str, list[float]]
"""Seconds by name."""


def turns(engines: dict[str, VLLM], copy: Copy, num_prompts: int) -> Times:
    """Each prompt cold and warm on every engine in turn."""
    times: Times = {}

    def note(name: str, seconds: float) -> None:
        if index >= 0:  # the first prompt warms everything up
            times.setdefault(name, []).append(seconds)

    for index in range(-1, num_prompts):
        for name in sorted(engines, reverse=bool(index % 2)):
            cold = engines[name].first(prompt(index))
            note(f"{name} cold", cold.ttft_s)
            time.sleep(SETTLE_PICKLE_S if name == PICKLE else SETTLE_S)
            for _ in range(WARM):
                warm = engines[name].first(prompt(index))
                _check(name, cold, warm)
                note(f"{name} warm", warm.ttft_s)
                note("load", copy.seconds())
            if name == PLAIN:
                for _ in range(WARM):
                    longer = engines[name].first([*prompt(index), 10])
                    if longer.cached != PROMPT_TOKENS:
                        raise RuntimeError(f"vLLM's own cache held {longer.cached} tokens")
                    note("floor", longer.ttft_s)
                    note("one token", engines[name].first([index + 10]).ttft_s)
    return times


def again(engine: VLLM, num_prompts: int) -> list[float]:
    """Every prompt once on an engine that has just started."""
    engine.first(prompt(-2, BLOCK_TOKENS))
    seconds = []
    for index in range(num_prompts):
        got = engine.first(prompt(index))
        if got.cached != PROMPT_TOKENS - 1:
            raise RuntimeError(f"after a restart {got.cached} tokens came from the cache")
        seconds.append(got.ttft_s)
    return seconds


def _check(name: str, cold: First, warm: First) -> None:
    if cold.words != warm.words:
        raise RuntimeError(f"{name}: the warm answer differs from the cold one")
    if cold.cached or warm.cached < PROMPT_TOKENS - 2 * CHUNK_TOKENS:
        raise RuntimeError(f"{name}: {cold.cached} tokens cached when cold, {warm.cached} when warm")


def run(model: Path, folder: Path, num_prompts: int, upstream: str | None) -> Times:
    """All engines, then ours restarted."""
    copy = Copy()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(common.Server(folder, L1_GB))
        server.wait_allocated()

        def serve(name: str, python: str, options: list[str]) -> VLLM:
            engine = VLLM(python, model, folder / f"vllm-{name}.log", options)
            stack.callback(common.stop, engine.process)
            return engine

        ours = serve("ours", sys.executable, transfer_config(server.port))
        engines = {"ours": ours, PLAIN: serve("plain", sys.executable, [])}
        for mode, transfer in MODES.items() if upstream else ():
            other = stack.enter_context(Upstream(folder, str(upstream), L1_GB, mode))
            options = transfer_config(other.port, mp_transfer_mode=transfer)
            engines[f"upstream, {mode}"] = serve(f"upstream-{mode}", str(upstream), options)
        for engine in engines.values():
            stack.enter_context(engine)
        times = turns(engines, copy, num_prompts)
        common.stop(ours.process)
        with serve("restarted", sys.executable, transfer_config(server.port)) as restarted:
            times["restarted"] = again(restarted, num_prompts)
    return times


def judge(report: common.Report, times: Times) -> None:
    """All rows: what is compared, and the bounds."""
    spreads = {name: common.spread(values, 1e3) for name, values in times.items()}
    cold, warm, load = (spreads[name] for name in ("ours cold", "ours warm", "load"))
    median = {name: figures["median"] for name, figures in spreads.items()}

    def add(name: str, ours: common.Spread, others: dict[str, common.Spread], bound: float | None) -> None:
        names = list(others)
        ratio = ours["median"] / others[names[0]]["median"]
        report.add(Row(name, "ms", {"ours": ours, **others}, ratio, f"ours / {names[0]}", bound))

    add("first token, cold", cold, {"plain vLLM": spreads[f"{PLAIN} cold"]}, None)
    add("first token, warm against cold", warm, {"cold": cold}, BOUND_RATIO)
    add("first token, vLLM restarted, against cold", spreads["restarted"], {"cold": cold}, BOUND_RATIO)
    beyond_ms = median["ours warm"] - median["load"]
    figures = {"ours": warm, "load": load}
    name = "first token, warm, beyond the load"
    report.add(Row(name, "ms", figures, beyond_ms, "ours - load, ms", BOUND_BEYOND_LOAD_S * 1e3))
    figures |= {name: spreads[name] for name in ("floor", "one token")}
    rest_ms = beyond_ms - median["floor"]
    report.add(Row("first token, warm, beyond what vLLM needs", "ms", figures, rest_ms, "ours - load - floor, ms"))
    add("first token, warm, against vLLM's own cache", warm, {"vLLM": spreads[f"{PLAIN} warm"]}, 1.0)
    for mode in MODES if "upstream, shm warm" in spreads else ():
        for state, ours, bound in (("warm", warm, 1.0), ("cold", cold, None)):
            others = {"upstream": spreads[f"upstream, {mode} {state}"]}
            add(f"first token, {state}, upstream by {mode}", ours, others, bound)


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=4, help="different prompts (default 4)")
    parser.add_argument("--model", type=Path, help="folder of the small model; made when missing")
    parser.add_argument("--upstream", metavar="PYTHON", help="an environment with vLLM and the upstream project")
    args = parser.parse_args()
    if args.prompts < 2:
        parser.error("--prompts must be at least 2")
    report = common.Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(args.model or folder / "small-llama")
        times = run(model, folder, args.prompts, args.upstream)
    judge(report, times)
    return report.end(args.json, {"seconds": times})


if __name__ == "__main__":
    sys.exit(main())
