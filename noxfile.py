"""Every gate of the project, one session each; `nox -l` lists them, `./run test` runs them all.

Gates test what users get: wheels built from sdists, installed into environments of their own. Those are made once under
.nox and used again until their recipe changes (scripts/environments.py, scripts/artefacts.py).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nox

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))

import artefacts  # noqa: E402
import bench_form  # noqa: E402
import long_form  # noqa: E402
import upstream_env  # noqa: E402
from environments import (  # noqa: E402
    CACHE,
    FULL_PYTHONS,
    THIN_PYTHONS,
    Missing,
    environment,
    find_python,
    install_wheel,
    main_version,
    site_packages,
    torch_site,
)

nox.options.error_on_external_run = False
nox.options.stop_on_first_error = False
nox.options.sessions = [
    *("lint", "types", "imports", "unit", "native", "cuda", "cli", "browser", "server", "tiers", "regress", "sim"),
    *("hostile", "guard", "engine", "compat", "e2e-vllm"),
]

SOURCES = [ROOT / "packages" / "lmcache-cli" / "src", ROOT / "packages" / "lmcache" / "src"]
_outcomes: dict[str, str] = {}


def gate(budget_s: int, name: str) -> Callable[[Callable[[nox.Session], None]], Callable[[nox.Session], None]]:
    """Register a session whose time is printed against a budget; a budget that is overrun is reported, not enforced."""

    def register(function: Callable[[nox.Session], None]) -> Callable[[nox.Session], None]:
        @functools.wraps(function)
        def timed(session: nox.Session) -> None:
            start = time.monotonic()
            _outcomes[name] = "failed"
            try:
                function(session)
                _outcomes[name] = "passed"
            finally:
                spent = time.monotonic() - start
                over = ", OVER BUDGET" if spent > budget_s else ""
                _outcomes[name] += f" in {spent:.0f} s of {budget_s} s{over}"
                print(f"gate {name} {_outcomes[name]}", flush=True)

        return nox.session(name=name, venv_backend="none")(timed)

    return register


@atexit.register
def _closing_line() -> None:
    failed = [name for name, outcome in _outcomes.items() if outcome.startswith("failed")]
    for name, outcome in _outcomes.items():
        print(f"  {name:9} {outcome}")
    if _outcomes:
        named = f": {', '.join(failed)}" if failed else ""
        print(f"{len(_outcomes) - len(failed)} gates passed, {len(failed)} failed{named}")


def pytest(session: nox.Session, python: Path, tests: str, *options: str, env: dict[str, str] | None = None) -> None:
    """Run tests from an empty folder, so that nothing but the environment can be imported."""
    session.log(f"tests run on {python}")
    with tempfile.TemporaryDirectory() as elsewhere, session.chdir(elsewhere):
        command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / tests), *options, *session.posargs]
        session.run(*command, env={"PYTHONPATH": "", **(env or {})})


def native_build(session: nox.Session, name: str, target: str, *options: str) -> Path:
    """Folder .cache/NAME with a target of csrc built in it."""
    python = artefacts.build_environment(main_version())
    cmake, folder = str(python.parent / "cmake"), CACHE / name
    pybind11 = site_packages(python) / "pybind11" / "share" / "cmake" / "pybind11"
    places = [f"-DPython_EXECUTABLE={python}", f"-Dpybind11_DIR={pybind11}"]
    session.run(cmake, "-S", str(ROOT / "csrc"), "-B", str(folder), *places, *options, silent=True)
    session.run(cmake, "--build", str(folder), "--parallel", "2", "--target", target, silent=True)
    return folder


def extras(*names: str) -> list[str]:
    """What extras of the full wheel require."""
    optional = artefacts.FULL_PROJECT["project"]["optional-dependencies"]
    return [requirement for name in names for requirement in optional[name]]


def requirements_site(version: str) -> Path:
    """Folder with all that the full wheel (but torch) and its tests require, shared by environments."""
    needed = [*artefacts.full_requirements(), *artefacts.group("test", "native")]
    return site_packages(environment(f"requirements-{version}", version, needed))


def full_environment(version: str) -> Path:
    """An environment with the full wheel and all it requires but torch; returns its python."""
    python = environment(f"full-{version}", version, [], sites=[requirements_site(version)])
    install_wheel(python, artefacts.full_wheel(version))
    return python


def available(session: nox.Session, versions: tuple[str, ...]) -> list[str]:
    """Those Python versions that are on this machine; the others are listed, and missed where CI=true."""
    here = []
    for version in versions:
        try:
            find_python(version)
            here.append(version)
        except Missing as missing:
            if os.environ.get("CI") == "true":
                session.error(f"{missing}, and CI skips nothing")
            session.warn(f"SKIPPED Python {version}: {missing}")
    return here


@gate(20, "lint")
def lint(session: nox.Session) -> None:
    """ruff: rules and format."""
    ruff = environment("lint", main_version(), artefacts.group("lint")).parent / "ruff"
    session.run(str(ruff), "check", str(ROOT))
    session.run(str(ruff), "format", "--check", str(ROOT))


@gate(90, "types")
def types(session: nox.Session) -> None:
    """mypy --strict on both packages."""
    python = environment("types", main_version(), [*artefacts.full_requirements(), *artefacts.group("types")])
    session.run(str(python), "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"))


@gate(20, "imports")
def imports(session: nox.Session) -> None:
    """import-linter: imports run downhill, heavy dependencies have one door."""
    python = environment("imports", main_version(), artefacts.group("imports"))
    path = os.pathsep.join(map(str, SOURCES))
    session.run(str(python.parent / "lint-imports"), "--config", str(ROOT / "pyproject.toml"), env={"PYTHONPATH": path})


@gate(120, "unit")
def unit(session: nox.Session) -> None:
    """Everything that needs neither an engine nor a running server; no torch."""
    pytest(session, full_environment(main_version()), "tests/unit")


@gate(180, "native")
def native(session: nox.Session) -> None:
    """The copy engine against numpy and xxhash; then its own tests under ASan and UBSan."""
    pytest(session, full_environment(main_version()), "tests/native")
    folder = native_build(session, "sanitized", "native_tests", "-DLMCACHE_SANITIZE=ON")
    session.run(f"{folder}/native_tests")


@gate(180, "cuda")
def cuda(session: nox.Session) -> None:
    """Copies to and from GPUs, without one: emulated, under ASan and UBSan; then what nvcc makes of them."""
    version = main_version()
    sanitized = native_build(session, "sanitized", "cuda_tests", "-DLMCACHE_SANITIZE=ON")
    session.run(f"{sanitized}/cuda_tests")
    emulated = native_build(session, "emulated", "_native", "-DLMCACHE_CUDA=EMULATED")
    python = environment("cuda", version, artefacts.group("cuda"), sites=[requirements_site(version)])
    install_wheel(python, artefacts.full_wheel(version))
    pytest(session, python, "tests/cuda", env={"LMCACHE_TEST_EMULATED": str(emulated)})
    if shutil.which("nvcc") is None:
        session.warn("NOT RUN: the build by nvcc and the bounds of its kernels, for there is no nvcc in PATH")
        return
    built = native_build(session, "cuda", "_native", "-DLMCACHE_CUDA=ON")
    (module,) = built.glob("_native*.so")
    code = "import _native; assert _native.HAS_CUDA, _native"  # a machine without a driver imports it too
    session.run(str(python), "-c", code, env={"PYTHONPATH": str(built)})
    tools = site_packages(python) / "nvidia" / "cu13" / "bin"
    proof, bounds = ROOT / "scripts" / "cuda_proof.py", ROOT / "csrc" / "cuda_bounds.json"
    session.run(str(python), str(proof), str(module), str(bounds), str(tools))


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Where a GPU and nvcc are: exactness, bandwidth, overlap with compute, and the break-even of the two paths."""
    version = main_version()
    python = environment("gpu", version, [], sites=[requirements_site(version), torch_site()])
    install_wheel(python, artefacts.full_wheel(version))
    pytest(session, python, "tests/gpu", "-s", "-o", "faulthandler_timeout=1200")


@gate(420, "cli")
def cli(session: nox.Session) -> None:
    """The thin wheel alone, on every Python from 3.10."""
    for version in available(session, THIN_PYTHONS):
        python = environment(f"cli-{version}", version, [*artefacts.thin_requirements(), *artefacts.group("test")])
        install_wheel(python, artefacts.thin_wheel())
        pytest(session, python, "tests/cli")


@gate(60, "browser")
def browser(session: nox.Session) -> None:
    """The report page of `bench engine`, opened in Debian's chromium."""
    version = main_version()
    extra = artefacts.THIN_PROJECT["project"]["optional-dependencies"]["report"]
    needed = [*artefacts.thin_requirements(), *extra, *artefacts.group("test")]
    python = environment("browser", version, needed)
    install_wheel(python, artefacts.thin_wheel())
    pytest(session, python, "tests/browser")


@gate(480, "server")
def server(session: nox.Session) -> None:
    """Core and service process for real; the full wheel of every other Python starts, answers a ping and stops."""
    first, *others = available(session, FULL_PYTHONS)
    pytest(session, full_environment(first), "tests/server")
    for version in others:
        session.run(sys.executable, str(ROOT / "scripts" / "smoke.py"), str(full_environment(version)))


@gate(400, "tiers")
def tiers(session: nox.Session) -> None:
    """One suite over every adapter, each against its real store; then what each does when the store fails."""
    pytest(session, tiers_environment(), "tests/tiers")


@gate(60, "regress")
def regress(session: nox.Session) -> None:
    """Instructions and bytecodes that requests and copies cost, against what was recorded: counts, not times."""
    pytest(session, full_environment(main_version()), "tests/regress")


@gate(300, "sim")
def sim(session: nox.Session) -> None:
    """The real core, wire, cascade and connectors under a seeded scheduler, with faults."""
    pytest(session, full_environment(main_version()), "tests/sim/test_sim.py", "-o", "faulthandler_timeout=900")


@nox.session(venv_backend="none")
def planted(session: nox.Session) -> None:
    """Long: bugs planted on purpose, each of which the simulation must find."""
    plant(session, *session.posargs)


def plant(session: nox.Session, *options: str) -> None:
    """Run the simulation with one bug planted after the other."""
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=1800", *options]
    with session.chdir(ROOT):
        python = str(full_environment(main_version()))
        session.run(python, *command, str(ROOT / "tests" / "sim" / "test_planted.py"), env={"PYTHONPATH": ""})


@gate(400, "hostile")
def hostile(session: nox.Session) -> None:
    """Bytes and peers that mean no good, processes that die: an error for them, service for the others."""
    version = main_version()
    python = environment("hostile", version, artefacts.group("hostile"), sites=[requirements_site(version)])
    install_wheel(python, artefacts.full_wheel(version))
    pytest(session, python, "tests/hostile", "-o", "faulthandler_timeout=300")


@nox.session(venv_backend="none")
def fuzz(session: nox.Session) -> None:
    """Long: the decoders under coverage-guided fuzzing; options go to fuzz/run.py."""
    session.run(str(fuzz_environment()), str(ROOT / "fuzz" / "run.py"), *session.posargs)


def fuzz_environment() -> Path:
    """atheris and the full wheel; returns its python."""
    version = main_version()
    python = environment("fuzz", version, artefacts.group("fuzz"), sites=[requirements_site(version)])
    install_wheel(python, artefacts.full_wheel(version))
    return python


@nox.session(venv_backend="none")
def coverage(session: nox.Session) -> None:
    """Lines and branches of wire, cache, keys and layout under the unit and sim suites: 95 % of each at least."""
    version = main_version()
    python = environment("coverage", version, ["coverage>=7.10"], sites=[requirements_site(version)])
    install_wheel(python, artefacts.full_wheel(version))
    long_form.measure_coverage(session, python)


@nox.session(venv_backend="none")
def long(session: nox.Session) -> None:
    """Long: what shows the promises of docs/reliability.md, each with its figures; some hours.

    `-- 0.01` is a hundredth of it, `-- 1 kills sim` only these parts. Whatever the scale, `planted` and `coverage` are
    whole; `planted` is left out below 1 unless it is named. Servers of these parts kill and sweep: nothing that runs a
    server may run beside them.
    """
    python = full_environment(main_version())
    parts = long_form.parts(session, python)
    parts |= {"planted": lambda: plant(session), "coverage": lambda: coverage(session)}
    parts["fuzz"] = lambda: long_form.fuzz(session, fuzz_environment())
    long_form.run(session, parts)


@gate(240, "guard")
def guard(session: nox.Session) -> None:
    """Both wheels as artefacts, and what happens when they meet in one environment."""
    version = main_version()
    artefacts.thin_wheel()
    artefacts.full_wheel(version)
    env = {
        "LMCACHE_TEST_WHEELS": str(artefacts.sdists()),
        "LMCACHE_TEST_SITE": str(requirements_site(version)),
        "LMCACHE_TEST_BUILD_PYTHON": str(artefacts.build_environment(version)),
    }
    pytest(session, environment("guard", version, ["pip", *artefacts.group("test")]), "tests/wheels", env=env)


@gate(240, "engine")
def engine(session: nox.Session) -> None:
    """transformers and `lmcache engine` with us: outputs equal those without us; the demo runs."""
    pytest(session, engine_environment(), "tests/engine", "-o", "faulthandler_timeout=240")


@gate(400, "compat")
def compat(session: nox.Session) -> None:
    """Our command line against upstream servers of four generations, upstream's command line against our server."""
    pythons = {name: str(path) for name, path in upstream_env.upstream_pythons().items()}
    env = {"LMCACHE_TEST_UPSTREAM": json.dumps(pythons)}
    pytest(session, full_environment(main_version()), "tests/compat", env=env)


@gate(800, "e2e-vllm")
def e2e_vllm(session: nox.Session) -> None:
    """Stock vLLM on the CPU with us: outputs equal those without us. Nothing else runs beside it."""
    pytest(session, vllm_environment(), "tests/e2e", "-o", "faulthandler_timeout=600")


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """All benchmarks in one run, beside upstream's release and the bare machine; `-- --full`, `-- --only NAME ...`."""
    bench_form.run(session, tiers_environment(), vllm_environment())


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Server and our own small engine: a long document, asked cold, warm and after a restart."""
    session.run(str(engine_environment()), "-m", "lmcache_cli", "demo", *session.posargs)


@nox.session(name="demo-vllm", venv_backend="none")
def demo_vllm(session: nox.Session) -> None:
    """Server and stock vLLM end to end: a long prompt, asked twice."""
    session.run(str(vllm_environment()), str(ROOT / "examples" / "vllm_cpu" / "demo.py"), *session.posargs)


def engine_environment() -> Path:
    """torch, transformers and the full wheel; returns its python."""
    version = main_version()
    needed = [*artefacts.full_requirements(), *extras("engine"), *artefacts.group("test")]
    python = environment("engine", version, needed, sites=[torch_site()])
    install_wheel(python, artefacts.full_wheel(version))
    return python


def tiers_environment() -> Path:
    """The full wheel and the libraries and servers of all tiers; returns its python."""
    version = main_version()
    needed = [*extras("redis", "object", "mooncake", "seal"), *artefacts.group("tiers", "native")]
    recipe = ROOT / "scripts" / "tier_env.py"
    python = environment("tiers", version, needed, sites=[requirements_site(version)], script=recipe)
    install_wheel(python, artefacts.full_wheel(version))
    return python


def vllm_environment() -> Path:
    """Stock vLLM, torch and the full wheel; returns its python."""
    version = main_version()
    needed = [*artefacts.full_requirements(), *extras("redis"), *artefacts.group("test", "native")]
    recipe = ROOT / "scripts" / "vllm_cpu_env.py"
    python = environment("vllm", version, needed, sites=[torch_site()], script=recipe)
    install_wheel(python, artefacts.full_wheel(version))
    return python
