"""Start-up of the command line, whole process: ours in both wheels, and upstream's in both of theirs.

    python benchmarks/cli_startup.py [--json PATH] [--rounds 7] [--upstream PYTHON] [--upstream-thin PYTHON]

Every command runs once a round, all in turn, after one round that warms the file cache and is not counted. Yardstick,
of the same interpreter: `python -c "import click"`. Ours thin and full are the two wheels that this checkout builds,
each in an environment of its own; all command lines ask one server of ours that the script starts. Upstream's are
measured where an environment of theirs is named: --upstream of the whole package, whose command line its full wheel
is, and --upstream-thin of its command line alone (`scripts/upstream_env.py` makes them and says where they are).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
from common import Row

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

from startup_env import startup_environments

L1_GB = 0.125
BOUNDS = {"-h": 2.5, "ping": 3.0, "describe": 6.0}
"""What a command of ours may take, in times of the yardstick."""


def commands(url: str) -> dict[str, list[str]]:
    """The words of each measured command."""
    return {
        "-h": ["-h"],
        "ping": ["ping", "kvcache", "--url", url],
        "describe": ["describe", "kvcache", "--url", url],
    }


def elapsed_ms(command: list[str], env: dict[str, str]) -> float:
    """One run, from spawn to exit.

    Raises:
        RuntimeError: it failed.
    """
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, env=env)
    spent_s = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.decode()[-400:]}")
    return spent_s * 1e3


def run(rounds: int, upstream: dict[str, Path]) -> dict[str, Any]:
    """Medians and quartiles in ms by `world command`, all taken in turn."""
    ours = startup_environments()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LMCACHE_", "PYTHON"))}
    env["LMCACHE_TRACK_USAGE"] = "false"
    with tempfile.TemporaryDirectory() as name, common.Server(Path(name), L1_GB, str(ours["ours full"])) as server:
        lines = {f"click {world}": [str(python), "-c", "import click"] for world, python in ours.items()}
        for world, python in {**ours, **upstream}.items():
            program = str(python.with_name("lmcache"))
            lines |= {f"{world} {words}": [program, *line] for words, line in commands(server.url).items()}
        times: dict[str, list[float]] = {title: [] for title in lines}
        for count in range(rounds + 1):
            for title, line in lines.items():
                spent_ms = elapsed_ms(line, env)
                if count:
                    times[title].append(spent_ms)
    return {title: common.spread(values) for title, values in times.items()}


def main() -> int:
    """Exit 1 when a bound is missed."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each command (default 7)")
    parser.add_argument("--upstream", type=Path, metavar="PYTHON", help="of an environment with upstream's package")
    parser.add_argument("--upstream-thin", type=Path, metavar="PYTHON", help="of one with upstream's CLI alone")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    chosen = {"upstream thin": args.upstream_thin, "upstream full": args.upstream}
    report = common.Report()
    taken = run(args.rounds, {world: python for world, python in chosen.items() if python is not None})
    for wheel in ("thin", "full"):
        for words, bound in BOUNDS.items():
            names = {"ours": f"ours {wheel} {words}", "import click": f"click ours {wheel}"}
            names["upstream"] = f"upstream {wheel} {words}"
            figures = {name: taken[title] for name, title in names.items() if title in taken}
            ratio = figures["ours"]["median"] / figures["import click"]["median"]
            report.add(Row(f"lmcache {words}, {wheel} wheel", "ms", figures, ratio, "ours / import click", bound))
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
