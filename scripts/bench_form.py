"""Body of the session `bench`: what benchmarks/suite.py needs besides, and where its figures go; for noxfile.py."""

from __future__ import annotations

from pathlib import Path

import nox
import peer_env
import upstream_env
from environments import environment, main_version, torch_site
from startup_env import startup_environments

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / ".cache" / "bench"
PAGE = ROOT / "docs" / "performance.md"
SUCCESS = (0, 1)
"""A missed bound is a result, and said; a benchmark that fails is not."""


def run(session: nox.Session, tiers: Path, vllm: Path) -> None:
    """Run the suite. The tables of docs/performance.md are written anew by a whole run in the long form.

    Args:
        tiers: python of an environment with the full wheel and the tiers' libraries, for all but the engines.
        vllm: python of one with the full wheel and stock vLLM.
    """
    peer = environment("peer", main_version(), [], sites=[torch_site()], script=Path(peer_env.__file__))
    thin = environment("upstream-cli", main_version(), [f"lmcache-cli=={upstream_env.CLI}"])
    startup_environments()  # made here, since the environment that the suite runs in has no pip
    command = [str(tiers), str(ROOT / "benchmarks" / "suite.py"), str(OUT), *session.posargs]
    command += ["--vllm", str(vllm), "--upstream", str(peer), "--upstream-thin", str(thin)]
    if "--full" in session.posargs and "--only" not in session.posargs:
        command += ["--page", str(PAGE)]
    session.run(*command, success_codes=SUCCESS, env={"PYTHONPATH": ""})
    session.log(f"figures: {OUT}")
