"""What the cache costs traffic that never repeats: stock vLLM with the connector and a server, against plain vLLM.

    python benchmarks/no_reuse.py [--json PATH] [--pairs 9] [--prompts 24] [--model FOLDER]

Run it with the Python of an environment that has vLLM and this project. Both engines live from the first to the last
batch, each in its own process; a batch is given to one and then to the other, and who is first alternates. Every prompt
is new: nothing is ever found, everything is looked up, hashed and stored, and once L1 is full each store evicts.
Prompts have 512 to 1024 tokens, answers 32, 8 at a time. The slowdown is the mean of the pairs' ratios; its upper bound
is the 95th percentile of a bootstrap over the pairs.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import Row
from engines import small_model

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "e2e"))
from engine import Engine  # type: ignore[import-not-found]

CONCURRENT, ANSWER_TOKENS = 8, 32
PROMPT_TOKENS = (512, 1024)
L1_GB = 2.0
SETTLE_S = 0.5
"""Between batches, so that the last stores of one engine do not run beside the other's batch."""

RESAMPLES = 10_000
BOUND = 0.02


def batch(source: random.Random, num_prompts: int) -> list[list[int]]:
    """Prompts that nobody has seen."""
    return [[source.randrange(2, 4000) for _ in range(source.randint(*PROMPT_TOKENS))] for _ in range(num_prompts)]


def upper_bound(ratios: Sequence[float], source: random.Random) -> float:
    """95th percentile of the bootstrapped geometric mean of ``ratios`` (percentile bootstrap, Efron 1979)."""
    logs = [math.log(ratio) for ratio in ratios]
    means = sorted(statistics.fmean(source.choices(logs, k=len(logs))) for _ in range(RESAMPLES))
    return math.exp(means[int(0.95 * RESAMPLES)])


def run(model: Path, folder: Path, num_pairs: int, num_prompts: int) -> dict[str, Any]:
    """Seconds of every batch on both engines, and how much was stored."""
    source = random.Random("no reuse")
    pairs: list[dict[str, float]] = []
    with common.Server(folder, L1_GB) as server:
        server.wait_allocated()
        settings = {"max_num_seqs": CONCURRENT}
        with Engine(model, folder, **settings) as plain, Engine(model, folder, port=server.port, **settings) as ours:
            engines = {"plain": plain, "ours": ours}
            for index in range(-1, num_pairs):
                prompts = batch(source, num_prompts)
                order = ["plain", "ours"] if index % 2 else ["ours", "plain"]
                pair: dict[str, float] = {"tokens": float(sum(map(len, prompts)) + ANSWER_TOKENS * num_prompts)}
                answers = {}
                for name in order:
                    answer = engines[name].generate(prompts, ANSWER_TOKENS)
                    pair[name], answers[name] = answer["seconds"], answer["tokens"]
                    time.sleep(SETTLE_S)
                if answers["plain"] != answers["ours"]:
                    raise RuntimeError("the answers differ")
                if index >= 0:  # the first pair warms both up
                    pairs.append(pair)
                    print(f"  pair {index}: plain {pair['plain']:.2f} s, ours {pair['ours']:.2f} s", flush=True)
        entries = server.status()["storage_manager"]["l1_manager"]["total_object_count"]
    return {"pairs": pairs, "entries_at_end": entries}


def main() -> int:
    """Exit 1 when the bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--pairs", type=int, default=9, help="batches on each engine (default 9, at least 7)")
    parser.add_argument("--prompts", type=int, default=24, help="prompts of a batch (default 24)")
    parser.add_argument("--model", type=Path, help="folder of the small model; made when missing")
    args = parser.parse_args()
    if args.pairs < 7 or args.prompts < CONCURRENT:
        parser.error(f"--pairs must be at least 7 and --prompts at least {CONCURRENT}")
    report = common.Report()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result = run(small_model(args.model or folder / "small-llama"), folder, args.pairs, args.prompts)
    pairs = result["pairs"]
    ratios = [pair["ours"] / pair["plain"] for pair in pairs]
    rates = {name: common.spread([pair["tokens"] / pair[name] for pair in pairs]) for name in ("ours", "plain")}
    slowdown = math.exp(statistics.fmean(map(math.log, ratios))) - 1
    upper = upper_bound(ratios, random.Random(0)) - 1
    figures = {"ours": rates["ours"], "plain vLLM": rates["plain"]}
    says = "upper 95 % bound of the slowdown, %"
    typical = statistics.median(ratios) - 1
    note = f"slowdown {100 * slowdown:+.2f} %, median of {len(pairs)} pairs {100 * typical:+.2f} %"
    report.add(Row("throughput without any reuse", "tokens/s", figures, 100 * upper, says, 100 * BOUND, note=note))
    return report.end(args.json, {**result, "ratios": ratios, "slowdown": slowdown, "slowdown_upper_95": upper})


if __name__ == "__main__":
    sys.exit(main())
