"""An engine that comes to a state and waits there to be killed: ``dying.py ATTACH_PATH STATE``."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from server_running import Engine

from lmcache.wire import codec, framing
from lmcache.wire import messages as m


def main(path: str, state: str) -> None:
    """Get there, say so, and stay."""
    keep: list[object] = []
    if state in ("connected", "half", "asked"):
        data = framing.pack(m.Attach(version=m.WIRE_VERSION, pid=os.getpid(), name=state, want_pool=True))
        visitor = socket.socket(socket.AF_UNIX)
        visitor.connect(path)
        visitor.sendall({"connected": b"", "half": data[:9], "asked": data}[state])
        keep.append(visitor)
    else:
        engine = Engine(SimpleNamespace(attach_path=path), register=state not in ("attached", "greeted"))  # type: ignore[arg-type]
        names: list[object] = [(state, os.getpid(), number) for number in range(8)]
        if state in ("leased", "promoting", "deaf"):
            engine.store(names)
            engine.lookup(names)
        if state in ("reserved", "deaf"):
            engine.reserve([(name, "unwritten") for name in names])
        if state == "promoting":
            engine.client.send(m.Lookup(0, keys=os.urandom(32) * 8, promote=True))
        if state == "deaf":
            for _ in range(5000):
                engine.client._line.send(codec.encode(m.Ping(1)))
        keep.append(engine)
    print("now", flush=True)
    while keep:
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
