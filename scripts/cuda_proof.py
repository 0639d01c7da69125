"""What can be known of CUDA kernels without a GPU: machine code for each architecture, within recorded bounds.

Usage: cuda_proof.py MODULE BOUNDS FOLDER
    MODULE: a library with kernels in it; BOUNDS: csrc/cuda_bounds.json; FOLDER: holds cuobjdump and nvdisasm.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)")
WIDE_LOAD, WIDE_STORE = re.compile(r"\bLDG\.\S*128"), re.compile(r"\bSTG\.\S*128")


def dump(folder: Path, module: Path, *options: str) -> str:
    """Output of cuobjdump, which looks for nvdisasm in PATH."""
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    command = [str(folder / "cuobjdump"), *options, str(module)]
    return subprocess.run(command, env={**os.environ, "PATH": path}, check=True, capture_output=True, text=True).stdout


def by_architecture(text: str) -> dict[str, str]:
    """What cuobjdump says of the machine code of each architecture."""
    found: dict[str, str] = {}
    for part in text.split("Fatbin elf code:")[1:]:
        part = part.split("Fatbin ptx code:")[0]
        match = re.search(r"arch = (sm_\w+)", part)
        if match:
            found[match[1]] = found.get(match[1], "") + part
    return found


def kernels(usage: str, names: set[str]) -> dict[str, tuple[int, int, int]]:
    """Registers, stack bytes and shared bytes of each kernel, by its plain name."""
    found = {}
    for mangled, *numbers in USAGE.findall(usage):
        name = next((name for name in names if f"{len(name)}{name}E" in mangled), mangled)
        registers, stack, shared = map(int, numbers)
        found[name] = (registers, stack, shared)
    return found


def problems(module: Path, bounds: dict[str, object], folder: Path) -> list[str]:
    """One sentence for each thing that is not as recorded."""
    wrong = []
    limits: dict[str, dict[str, int]] = bounds["kernels"]  # type: ignore[assignment]
    usage = by_architecture(dump(folder, module, "--dump-resource-usage"))
    code = by_architecture(dump(folder, module, "-sass"))
    if f".{bounds['ptx']}.ptx" not in dump(folder, module, "--list-ptx"):
        wrong.append(f"there is no PTX of {bounds['ptx']} for GPUs that come later")
    if sorted(usage) != sorted(bounds["architectures"]):  # type: ignore[call-overload]
        wrong.append(f"machine code is for {', '.join(sorted(usage))}, not for {bounds['architectures']}")
    for architecture, text in usage.items():
        for kind, pattern in (("load", WIDE_LOAD), ("store", WIDE_STORE)):
            if not pattern.search(code[architecture]):
                wrong.append(f"{architecture} has no 16-byte {kind}")
        found = kernels(text, set(limits))
        if set(found) != set(limits):
            wrong.append(f"{architecture} has the kernels {sorted(found)}, not {sorted(limits)}")
            continue
        for name, (registers, stack, shared) in sorted(found.items()):
            print(f"{architecture:7} {name:8} {registers} registers, {shared} shared bytes, {stack} stack bytes")
            limit = limits[name]
            if registers > limit["registers"] or stack > limit["stack_bytes"] or shared > limit["shared_bytes"]:
                wrong.append(f"{architecture} {name} is beyond its bounds {limit}")
    return wrong


def main() -> int:
    """Exit status: 0 where all is as recorded."""
    module, bounds, folder = (Path(argument) for argument in sys.argv[1:])
    wrong = problems(module, json.loads(bounds.read_text()), folder)
    for sentence in wrong:
        print(f"cuda_proof: {sentence}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
