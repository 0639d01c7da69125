"""The service process: HTTP and metrics. It holds no state, so that the core may restart it at any time.

Its standard input is a socket to the core: one line of JSON comes in at the start; its end means that the core is gone.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
from typing import Any

from lmcache.server import http
from lmcache.server.link import CoreLink

_BOOT_BYTES_MAX = 64 << 10
_PR_SET_PDEATHSIG = 1
_STOP_S = 0.8

log = logging.getLogger("lmcache.service")


def main() -> None:
    """Entry of ``python -m lmcache.server.service``; only the core starts it."""
    # Even a service that hangs ends with the core.
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    core = socket.socket(fileno=0)
    boot = _read_boot(core)
    logging.basicConfig(level=boot["log_level"], format=boot["log_format"])
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    asyncio.run(_serve(core, boot))


def _read_boot(core: socket.socket) -> dict[str, Any]:
    data = bytearray()
    while not data.endswith(b"\n"):
        part = core.recv(_BOOT_BYTES_MAX)
        if not part:
            raise SystemExit(0)
        data += part
    boot: dict[str, Any] = json.loads(data)
    return boot


async def _serve(core: socket.socket, boot: dict[str, Any]) -> None:
    link = CoreLink(boot["endpoint"], bytes.fromhex(boot["token"]))
    server = http.build_server(http.build_app(link, boot["config"], boot["config"]["chunk_tokens"], boot["version"]))
    loop = asyncio.get_running_loop()
    core.setblocking(False)

    def core_gone() -> None:
        loop.remove_reader(core)
        server.stop()
        loop.call_later(_STOP_S, os._exit, 0)

    loop.add_reader(core, core_gone)
    listener = socket.socket(fileno=boot["http_fd"])
    try:
        await server.serve(sockets=[listener])
    finally:
        link.close()


if __name__ == "__main__":
    main()
