"""Structural faults between a store and its use: 0 wrong bytes may be used, whatever is damaged, late or taken away.

``python tests/hostile/structural.py --faults 10000 --seed 1``. Real server with a file tier, real copy engine, the
connectors' own session and copier (``structural_rig.py``). Every fault (``structural_faults.py``) is followed by two
uses, and counted by what became of it: *caught* (a chunk failed its check, and the engine computes it), *missed* (a
chunk was not found: never published, quarantined, or its object taken out), *harmless* (all chunks were used, and
right) or *wrong*.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "server"), str(Path(__file__).parent)]

from server_running import running  # noqa: E402 - the path is set above
from structural_faults import ENDS, Faults  # noqa: E402
from structural_rig import Rig  # noqa: E402

POOL_GB = 0.015625  # 4,096 extents
TIER_GB = "0.0625"
PROGRESS_FAULTS = 2000


def run(faults: int, seed: int) -> Faults:
    """So many faults."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--l2-path", f"{folder}/l2", "--l2-size-gb", TIER_GB]
        with running(folder, *options, pool_gb=POOL_GB) as server:
            rig = Rig(server, Path(folder) / "l2")
            other = Rig(server, Path(folder) / "l2", "other")
            made = Faults(rig, other, seed)
            try:
                for number in range(1, faults + 1):
                    made.one()
                    if number % PROGRESS_FAULTS == 0:
                        print(f"{number} faults, {made.num_used} chunks used, {len(made.wrong)} wrong", flush=True)
            finally:
                rig.close()
                other.close()
            return made


def main() -> int:
    """Run, print a line a kind; exit status 1 where a wrong byte was used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    started = time.monotonic()
    made = run(asked.faults, asked.seed)
    print(f"{'':44}", *(f"{end:>8}" for end in ENDS))
    for kind in made.kinds:
        print(f"{kind:44}", *(f"{made.counts[kind, end]:8}" for end in ENDS))
    for kind, name in made.wrong[:20]:
        print(f"WRONG BYTES: {name} after {kind}")
    print(
        f"seed {asked.seed}, {time.monotonic() - started:.0f} s: {asked.faults} faults, "
        f"{made.num_used} chunks used, {len(made.wrong)} wrong"
    )
    return 1 if made.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
