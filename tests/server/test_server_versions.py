"""A process of another wire version is told so, with the remedy, and passes through."""

from __future__ import annotations

import subprocess
import sys

from server_running import Server

# The client's half is put one version ahead; the server is the real one.
NEWER = """
import logging, sys, time
import lmcache.connectors.link as link
import lmcache.wire.codec as codec

logging.basicConfig(format="%(message)s")
newer = codec.WIRE_VERSION + 1
link.WIRE_VERSION = codec.WIRE_VERSION = newer
codec._VERSION_BYTE = bytes([newer])
line = link.Link(link.Address("tcp://127.0.0.1", int(sys.argv[1])), "worker", False, lambda _: None)
line.wait_first_try(20)  # then several attempts more
time.sleep(2)
print("attached" if line.line else "passing through")
"""


def test_a_process_of_another_wire_version_says_so_once_and_names_the_remedy(shared: Server) -> None:
    command = [sys.executable, "-c", NEWER, str(shared.rpc_port)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "passing through"
    (told,) = [line for line in ran.stderr.splitlines() if line.strip()]
    assert "install the same lmcache version on both sides" in told
