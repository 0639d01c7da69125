"""``python -m tests.sim --seed N``: run worlds; the first that goes wrong is shown with its trace."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from .mutations import BY_NAME
from .planted import plant

if TYPE_CHECKING:
    from .world import Result

STEPS = 1500


def main() -> int:
    """Exit 1 where an invariant did not hold."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim")
    parser.add_argument("--seed", type=int, help="one seed, run twice to see that it replays")
    parser.add_argument("--seeds", default="0-99", help="A-B, both included")
    parser.add_argument("--steps", type=int, default=STEPS, help="until everybody comes to rest")
    parser.add_argument("--trace", type=int, default=60, help="lines of the trace of the first seed that failed")
    parser.add_argument("--first", action="store_true", help="end with the first seed that fails")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--mutation", choices=sorted(BY_NAME), help="with this bug planted")
    options = parser.parse_args()
    if options.mutation is not None:
        plant(options.mutation)
    first, _, last = options.seeds.partition("-")
    seeds = [options.seed] if options.seed is not None else range(int(first), int(last or first) + 1)
    started = time.monotonic()
    num_run, steps, failed, problem = 0, 0, 0, None
    running = results(seeds, options.steps, options.jobs)
    for result in running:
        num_run += 1
        steps += result.steps
        if result.problem is not None:
            failed += 1
            print(f"seed {result.seed} failed at step {result.steps}: {result.problem}", flush=True)
            problem = problem or result
            if options.first:
                running.close()
                break
    if problem is not None and options.trace:
        print("\n".join(problem.lines[-options.trace :]))
    if options.seed is not None:
        print(result.digest, result.counts)
        again = next(iter(results(seeds, options.steps, 1)))
        if again.digest != result.digest:
            print(f"seed {options.seed} does not replay: {again.digest}")
            failed += 1
    seconds = time.monotonic() - started
    print(f"{num_run} seeds, {failed} failed, {steps} steps, {steps / seconds:.0f} steps/s, {seconds:.1f} s")
    return 1 if failed else 0


def results(seeds: Sequence[int], steps: int, jobs: int) -> Generator[Result, None, None]:
    """Run worlds, in order of their seeds."""
    from .world import run_seed

    run = partial(run_seed, steps=steps)
    if jobs == 1:
        yield from map(run, seeds)
        return
    processes = ProcessPoolExecutor(jobs)
    try:
        yield from processes.map(run, seeds, chunksize=4)
    finally:
        processes.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
