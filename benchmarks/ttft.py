"""Time to first token of a long prompt on stock vLLM: computed, from our server, from vLLM's own cache.

    python benchmarks/ttft.py [--json PATH] [--prompts 7] [--model FOLDER] [--upstream PYTHON]

Run it with the Python of an environment that has vLLM and this project. All engines are up at once and take turns,
prompt by prompt: cold, then warm; at the end ours is restarted and asked once more. ``load`` is the verified copy of
the same bytes out of a pool, alone, by the same native call with the same threads, in this process; ``floor`` is the
time to first token of a prompt of one token: what HTTP, vLLM's scheduling and one forward cost without any cache.
--upstream: the Python of an environment with the same vLLM and upstream's lmcache 0.5.6, which then takes its turns,
too (engine-driven, pool by name: its fastest).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import sys
import tempfile
import time
from array import array
from pathlib import Path
from typing import Any

import common
from engines import VLLM, First, Upstream, small_model, transfer_config

from lmcache.connectors.copier import LOAD_THREADS
from lmcache.layout import LayerGroup, Layout, Plane
from lmcache.transfer import _native

PROMPT_TOKENS = 4096
L1_GB = 2.0
SETTLE_S = 0.5
"""After a cold request: its store must have ended before the prompt is asked again."""

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
    import ctypes

    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _u64(numbers: Any) -> memoryview:
    from array import array

    return memoryview(array("Q", numbers))


def prompt(seed: int, num_tokens: int = PROMPT_TOKENS) -> list[int]:
    """Random token ids that no other seed shares a chunk with."""
    source = random.Random(f"prompt {seed}")  # Random(-1) is Random(1)
    return [source.randrange(2, 4000) for _ in range(num_tokens)]


def turns(engines: dict[str, VLLM], copy: Copy, num_prompts: int) -> dict[str, list[float]]:
    """Each prompt cold and warm on every engine in turn; seconds by name."""
    times: dict[str, list[float]] = {"load": [], "floor": []}
    for index in range(-1, num_prompts):
        for name, engine in engines.items():
            cold = engine.first(prompt(index))
            time.sleep(SETTLE_S)
            warm = engine.first(prompt(index))
            _check(name, cold, warm)
            floor = engine.first([index + 10])
            if index >= 0:  # the first prompt warms everything up
                times.setdefault(f"{name} cold", []).append(cold.ttft_s)
                times.setdefault(f"{name} warm", []).append(warm.ttft_s)
                times["load"].append(copy.seconds())
                times["floor"].append(floor.ttft_s)
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


def run(model: Path, folder: Path, num_prompts: int, upstream: str | None) -> dict[str, list[float]]:
    """All engines, then ours restarted."""
    copy = Copy()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(common.Server(folder, L1_GB))
        server.wait_allocated()

        def serve(name: str, python: str, options: list[str]) -> VLLM:
            return VLLM(python, model, folder / f"vllm-{name}.log", options)

        ours = serve("ours", sys.executable, transfer_config(server.port))
        stack.callback(lambda: common.stop(ours.process))
        engines = {"ours": ours, "vllm": stack.enter_context(serve("own", sys.executable, []))}
        if upstream:
            other = stack.enter_context(Upstream(upstream, folder / "upstream.log", L1_GB))
            options = transfer_config(other.port)
            engines["upstream"] = stack.enter_context(serve("upstream", upstream, options))
        times = turns(engines, copy, num_prompts)
        common.stop(ours.process)
        with serve("restarted", sys.executable, transfer_config(server.port)) as restarted:
            times["ours restarted"] = again(restarted, num_prompts)
    return times


def report(times: dict[str, list[float]]) -> tuple[dict[str, Any], bool]:
    """Print the table and the bounds; returns the figures and whether all bounds are reached."""
    rows = {name: common.spread(values, 1e3) for name, values in times.items()}
    print(f"time to first token, {PROMPT_TOKENS} tokens, median (quartiles)")
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["median"]):
        print(f"{name:>16}  {common.text(row, 'ms'):>28}  min {row['min']:.1f}  n {row['n']:.0f}")
    cold, warm, load = (rows[name]["median"] for name in ("ours cold", "ours warm", "load"))
    floor = rows["floor"]["median"]
    print(f"warm beyond load and floor: {warm - load - floor:.1f} ms")
    reached = [
        common.judge("warm / cold", warm / cold, BOUND_RATIO, ""),
        common.judge("restarted / cold", rows["ours restarted"]["median"] / cold, BOUND_RATIO, ""),
        common.judge("warm beyond load", warm - load, BOUND_BEYOND_LOAD_S * 1e3, "ms"),
        common.judge("warm / vLLM's own cache", warm / rows["vllm warm"]["median"], 1.0, ""),
    ]
    if "upstream warm" in rows:
        reached.append(common.judge("warm / upstream's", warm / rows["upstream warm"]["median"], 1.0, ""))
    return rows, all(reached)


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--prompts", type=int, default=7, help="different prompts (default 7)")
    parser.add_argument("--model", type=Path, help="folder of the small model; made when missing")
    parser.add_argument("--upstream", metavar="PYTHON", help="an environment with the upstream project")
    args = parser.parse_args()
    if args.prompts < 2:
        parser.error("--prompts must be at least 2")
    facts = common.head()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = small_model(args.model or folder / "small-llama")
        times = run(model, folder, args.prompts, args.upstream)
    rows, reached = report(times)
    common.write(args.json, {**facts, "rows_ms": rows})
    return os.EX_OK if reached else 1


if __name__ == "__main__":
    sys.exit(main())
