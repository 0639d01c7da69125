"""The service process: HTTP and metrics. It holds no state, so that the core may restart it at any time.

Its standard input is a socket to the core: one line of JSON comes in at the start; its end means that the core is gone.
"""

from __future__ import annotations

import ctypes
import gc
import os
import select
import signal
from typing import TYPE_CHECKING, Any

_PR_SET_PDEATHSIG = 1


def _end_with_the_core() -> None:
    """Even a service that hangs ends with the core; so does one that was started by a core that has died since."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    poller = select.poll()
    poller.register(0, 0)
    if poller.poll(0):  # hung up
        raise SystemExit(0)


if __name__ == "__main__":
    # Ahead of the imports, which take a quarter of a second. None of what they make is garbage, and looking for some
    # takes a tenth of the time.
    _end_with_the_core()
    gc.disable()

import asyncio  # noqa: E402 - see above
import json  # noqa: E402
import logging  # noqa: E402
import socket  # noqa: E402
from collections.abc import Callable  # noqa: E402

from lmcache.server import http, tls  # noqa: E402
from lmcache.server.access import Role, Token  # noqa: E402
from lmcache.server.limits_file import LimitsFile, state_folder  # noqa: E402
from lmcache.server.link import CoreLink  # noqa: E402
from lmcache.system import SystemClock  # noqa: E402

if TYPE_CHECKING:
    from lmcache.cascade.run import Cascade

_BOOT_BYTES_MAX = 64 << 10
_STOP_S = 0.8

log = logging.getLogger("lmcache.service")


def main() -> None:
    """Entry of ``python -m lmcache.server.service``; only the core starts it."""
    core = socket.socket(fileno=0)
    boot, listener = _read_boot(core)
    logging.basicConfig(level=boot["log_level"], format=boot["log_format"])
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # below that, what a client can cause as often as it likes
    asyncio.run(_serve(core, boot, listener))


def _read_boot(core: socket.socket) -> tuple[dict[str, Any], socket.socket]:
    """What the core tells first, and the socket that HTTP is served on."""
    data, fds = bytearray(), []
    while not data.endswith(b"\n"):
        part, more, *_ = socket.recv_fds(core, _BOOT_BYTES_MAX, 1)
        if not part:
            raise SystemExit(0)
        data += part
        fds += more
    boot: dict[str, Any] = json.loads(data)
    return boot, socket.socket(fileno=fds[0])


async def _serve(core: socket.socket, boot: dict[str, Any], listener: socket.socket) -> None:
    link = CoreLink(boot["endpoint"], bytes.fromhex(boot["token"]))
    cascade = _cascade(boot)
    limits = LimitsFile(state_folder(boot["instance"]))
    config = boot["config"]
    access = http.Access([Token(Role(role), bytes.fromhex(digest)) for role, digest in boot["tokens"]])
    app = http.build_app(link, cascade, limits, config, config["chunk_tokens"], boot["version"], access)
    server = http.build_server(app, tls.context(config["tls_cert"], config["tls_key"]))
    loop = asyncio.get_running_loop()
    jobs = [] if cascade is None else [asyncio.create_task(_run_cascade(cascade, server.stop))]
    core.setblocking(False)

    def core_gone() -> None:
        loop.remove_reader(core)
        server.stop()
        loop.call_later(_STOP_S, os._exit, 0)

    loop.add_reader(core, core_gone)
    gc.freeze()
    gc.enable()
    try:
        await server.serve(sockets=[listener])
    finally:
        link.close()
        for job in jobs:
            job.cancel()
            await asyncio.wait([job])
        if cascade is not None:
            await cascade.close()


def _cascade(boot: dict[str, Any]) -> Cascade | None:
    config = boot["config"]
    if not config["tiers"]:
        return None
    from lmcache.cascade.run import Cascade
    from lmcache.tiers import make_tier

    tiers = [(name, make_tier(options)) for name, options in zip(boot["tier_names"], config["tiers"], strict=True)]
    token = bytes.fromhex(boot["token"])
    return Cascade(config["attach_path"], token, tiers, policy=config["write_policy"], clock=SystemClock())


async def _run_cascade(cascade: Cascade, stop: Callable[[], None]) -> None:
    """A cascade that fails ends the service process: the core starts another one."""
    try:
        await cascade.run()
    except asyncio.CancelledError:
        raise
    except BaseException:
        log.exception("the cascade failed")
        stop()


if __name__ == "__main__":
    main()
