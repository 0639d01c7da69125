"""Fuzzes the decoders: ``python fuzz/run.py [TARGET ...] --seconds 60``; needs ``pip install atheris``.

Coverage guides it. What it finds interesting is kept under ``--corpus`` (a folder a target) and used again; an input
that makes a target fail is written beside it as ``crash-*``. Each target runs in a process of its own, since libFuzzer
never returns. The exit status is the number of targets that failed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

MEMORY_MB = 1024
INPUT_BYTES_MAX = 8192
INPUT_S = 5


def fuzz(name: str, seconds: int, folder: Path) -> None:
    """Fuzz one target in this process; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["lmcache", "lmcache_cli"]):
        import targets

        target, seeds = targets.seeds()[name]
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-timeout={INPUT_S}",
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
        "-verbosity=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], target)
    atheris.Fuzz()


def main() -> int:
    """Each target for so long, one after the other; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, default=Path(".cache/fuzz"))
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        fuzz(asked.targets[0], asked.seconds, asked.corpus / asked.targets[0])
    from targets import seeds

    failed = []
    for name in asked.targets or seeds():
        command = [sys.executable, __file__, name, "--here", f"--seconds={asked.seconds}", f"--corpus={asked.corpus}"]
        done = subprocess.run(command, capture_output=True, text=True)
        counts = [line.split()[-1] for line in done.stderr.splitlines() if "number_of_executed_units" in line]
        print(
            f"{name}: {counts[0] if counts else '?'} inputs, {'failed' if done.returncode else 'no fault'}", flush=True
        )
        if done.returncode:
            failed.append(name)
            print(done.stderr[-4000:])
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
