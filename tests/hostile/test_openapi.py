"""schemathesis over the API's own description: every answer is one that it announces, whatever is asked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from server_running import Engines, Server
from witness import watched

PROGRAM = Path(sys.executable).parent / "st"
EXAMPLES = os.environ.get("LMCACHE_TEST_EXAMPLES", "40")


@pytest.mark.skipif(not PROGRAM.exists(), reason="schemathesis is not installed here")
def test_every_answer_to_generated_requests_is_one_that_the_description_announces(
    besieged: Server, engines: Engines
) -> None:
    engines(besieged).store(["something"])
    before = len(besieged.log())
    url = f"http://127.0.0.1:{besieged.http_port}/openapi.json"
    options = ["--checks=all", f"--max-examples={EXAMPLES}", "--workers=1", "--seed=1", "--no-color"]
    with watched(besieged, growth_mib=128):
        done = subprocess.run([str(PROGRAM), "run", url, *options], capture_output=True, text=True, cwd="/tmp")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "Traceback" not in besieged.log()[before:]
