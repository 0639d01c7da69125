"""Entry of the private server's process: `lmcache server` that ends with the process that started it."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """``python -m lmcache.benchmark.tier_child PARENT_PID FOLDER OPTION...``: run a server until that parent is gone.

    ``FOLDER`` is the parent's to remove, and ours when it cannot any more.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # until the server listens for it itself
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    parent, folder, *words = sys.argv[1:]
    try:
        if os.getppid() == int(parent):  # else it died before we could ask to be told
            from lmcache.server.command import server

            server(words, prog_name="lmcache server")
    finally:
        if os.getppid() != int(parent):
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
