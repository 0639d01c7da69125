"""Instructions that the copy engine executes for a KiB, counted by callgrind: what a change of csrc costs or saves is
seen to the percent, on any machine, however busy. AVX-512 is beyond valgrind; its loops are those of AVX2, wider.

Counts are judged against a plain loop that the same compiler made and the same run counted, so that another compiler
or another release of it moves both.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
ENGINE = ("copy", "guard", "kernels", "kernels_avx2", "kernels_avx512", "kernels_portable")
ENGINE += ("leaf", "plan", "threads", "xxh3")
FLAGS = {"kernels_avx2.cpp": ["-mavx2"], "kernels_avx512.cpp": ["-mavx512f", "-w"]}
RUN_S = 120

TOLERANCE = 1.10
"""Compilers differ by some percent even beside the reference; what is meant to be caught is more."""

# Instructions for a KiB over those of the reference, with g++ 12.2. Where a change makes one of them smaller for good,
# the smaller number belongs here.
RECORDED = {
    "avx2/hash": 0.183,
    "avx2/retrieve, runs of 256": 0.968,
    "avx2/retrieve, runs of 32768": 0.424,
    "avx2/retrieve, runs of 64": 2.563,
    "avx2/retrieve, runs of 8192": 0.473,
    "avx2/store, runs of 256": 1.127,
    "avx2/store, runs of 32768": 0.475,
    "avx2/store, runs of 64": 3.003,
    "avx2/store, runs of 8192": 0.538,
    "portable/hash": 0.761,
    "portable/retrieve, runs of 256": 2.636,
    "portable/retrieve, runs of 32768": 1.700,
    "portable/retrieve, runs of 64": 4.218,
    "portable/retrieve, runs of 8192": 2.145,
    "portable/store, runs of 256": 2.787,
    "portable/store, runs of 32768": 1.933,
    "portable/store, runs of 64": 4.729,
    "portable/store, runs of 8192": 2.181,
}


def compile_one(compiler: str, source: Path, folder: Path) -> Path:
    """One object file, as the Release build of csrc makes it; the reference stays plain."""
    made = folder / f"{source.stem}.o"
    level = ["-O1", "-fno-tree-vectorize"] if source.stem == "reference" else ["-O3", "-DNDEBUG"]
    options = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DLMCACHE_X86=1", f"-I{CSRC}", *level]
    subprocess.run([compiler, *options, *FLAGS.get(source.name, []), "-c", str(source), "-o", str(made)], check=True)
    return made


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Instructions a KiB of each "SET/CASE"."""
    folder = tmp_path_factory.mktemp("work")
    compiler = os.environ.get("CXX", "g++")
    sources = [*(CSRC / f"{name}.cpp" for name in ENGINE), HERE / "count_work.cpp", HERE / "reference.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: compile_one(compiler, source, folder), sources))
    program = folder / "count_work"
    subprocess.run([compiler, *map(str, objects), "-pthread", "-o", str(program)], check=True)
    valgrind = shutil.which("valgrind")
    assert valgrind is not None, "valgrind is not installed: see scripts/apt-packages"
    command = [valgrind, "--tool=callgrind", f"--callgrind-out-file={folder}/out", str(program)]
    subprocess.run(command, check=True, capture_output=True, timeout=RUN_S)
    figures = {}
    for path in folder.glob("out.*"):
        text = path.read_text(encoding="utf-8")
        named = re.search(r"^desc: Trigger: Client Request: (.+)/(\d+)$", text, re.MULTILINE)
        totals = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
        if named and totals:
            figures[named[1]] = int(totals[1]) / (int(named[2]) / 1024)
    return figures


def test_every_case_was_counted(counted: dict[str, float]) -> None:
    assert set(RECORDED) | {"plain/reference"} == set(counted)


@pytest.mark.parametrize("case", sorted(RECORDED))
def test_the_copy_engine_executes_no_more_instructions_than_were_recorded(case: str, counted: dict[str, float]) -> None:
    ratio = counted[case] / counted["plain/reference"]
    assert ratio <= RECORDED[case] * TOLERANCE, f"{case}: {ratio:.3f} of the reference, {RECORDED[case]} recorded"


def test_storing_in_small_runs_costs_more_than_in_long_ones(counted: dict[str, float]) -> None:
    # If not, what is counted is not the copy.
    for name in ("avx2", "portable"):
        assert counted[f"{name}/store, runs of 64"] > counted[f"{name}/store, runs of 8192"] > 0
