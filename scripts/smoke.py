"""Start an installed `lmcache server`, ping it with its own command line, stop it: python smoke.py ENV/bin/python"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEADLINE_S = 30


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ping(lmcache: Path, url: str, server: subprocess.Popen[bytes]) -> str:
    """Ask until the server answers; its answer."""
    give_up = time.monotonic() + DEADLINE_S
    while True:
        answer = subprocess.run([lmcache, "ping", "kvcache", "--url", url], capture_output=True, text=True)
        if answer.returncode == 0:
            return answer.stdout
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode} before it answered a ping")
        if time.monotonic() > give_up:
            sys.exit(f"no ping was answered within {DEADLINE_S} s; the last one said: {answer.stderr}")
        time.sleep(0.1)


def main(python: Path) -> None:
    """One life of a server. Exits with a sentence when anything is not as promised."""
    lmcache = python.parent / "lmcache"
    rpc, http = free_port(), free_port()
    command = [lmcache, "server", "--port", str(rpc), "--http-port", str(http), "--l1-size-gb", "0.125"]
    with tempfile.TemporaryDirectory() as home:
        env = {**os.environ, "XDG_RUNTIME_DIR": home}
        server = subprocess.Popen(command, env=env)
        try:
            print(ping(lmcache, f"http://127.0.0.1:{http}", server))
        finally:
            server.terminate()
            try:
                status = server.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                server.kill()
                sys.exit(f"the server did not stop within {DEADLINE_S} s of SIGTERM")
    if status != 0:
        sys.exit(f"the server stopped with status {status} on SIGTERM")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
