"""What the tests of the file tier share: where its files lie, and children with our import path."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conftest import HANG_S, run_with_tier
from making import Made

from lmcache.tiers.base import Share, Tier
from lmcache.tiers.objects import PAGE_BYTES

HERE = Path(__file__).parent


def file_of(options: dict[str, Any], key: bytes) -> Path:
    """Where an object lies."""
    return Path(options["base_path"]) / "1" / key.hex()[:2] / key.hex()


def capacity_for(count: int, made: Made) -> float:
    """Gigabytes that hold so many objects, and not one more."""
    return (made.num_bytes * count + PAGE_BYTES) / (1 << 30)


async def until(tier: Tier, num_objects: int) -> None:
    """Wait for the look through the folder to have found what is there."""
    deadline = time.monotonic() + HANG_S
    while (await tier.usage()).num_objects != num_objects:
        assert time.monotonic() < deadline, await tier.usage()
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)
    assert (await tier.usage()).num_objects == num_objects


async def settled(tier: Tier, folder: Path) -> list[Path]:
    """The objects' files, once the tier knows them all; what was put during the last look may have been too much."""
    deadline = time.monotonic() + HANG_S
    equal = 0
    while equal < 10:
        assert time.monotonic() < deadline, await tier.usage()
        await asyncio.sleep(0.02)
        files = list(folder.glob("1/??/*"))
        equal = equal + 1 if (await tier.usage()).num_objects == len(files) else 0
    return files


def fill(options: dict[str, Any], mades: Sequence[Made]) -> None:
    """Store objects one after the other."""

    async def work(tier: Tier) -> None:
        for made in mades:
            assert await tier.put(made.key, made.parts, Share(made.tenant))

    run_with_tier(options, work)


def python(script: str, *args: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """A child with our import path."""
    return subprocess.Popen(
        [*before, sys.executable, "-c", script, *args],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
        stdout=subprocess.PIPE,
        text=True,
    )


def mounted(kind: str, tmp_path: Path, script: str) -> Any:
    """What a child printed that has a file system of its own."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    shell = f'mount -t {kind} none "$1" && shift && exec "$@"'
    child = python(script, str(folder), before=["unshare", "-rm", "sh", "-c", shell, "sh", str(folder)])
    output, _ = child.communicate(timeout=HANG_S)
    assert child.returncode == 0
    return json.loads(output)
