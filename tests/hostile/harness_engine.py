"""One engine of the crash harness, a process: ``harness_engine.py ATTACH_PATH SEED``.

It stores, looks up and promotes chunks whose bytes follow from their names, attaches again whenever its line breaks,
and checks every byte that it would have used. Wrong bytes end it with status 3. Commands come by standard input, a word
a line:

- ``cut``: the attach socket is closed; the engine goes on for a moment with what it had been given, and writes into it
- ``rest``: everything is given back, and what was seen since the last rest is printed as JSON
- ``hold``: it leases and reserves, prints ``holding`` and waits for its death
- ``work``, ``end``
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import sys
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "server"))

from server_running import EXTENT_BYTES, Engine, contents

from lmcache.errors import LMCacheError, PeerRefused
from lmcache.wire import messages as m

NUM_PROMPTS, PROMPT_CHUNKS = 150, 8
PATIENCE_S = 3.0
WRONG = 3


class Worker:
    """The engine and what it remembers."""

    def __init__(self, attach_path: str, seed: int) -> None:
        self._server = SimpleNamespace(attach_path=attach_path)
        self._random = random.Random(seed)
        self._engine: Engine | None = None
        self.seen = {"accepted": 0, "rejected": 0, "stored": 0, "misses": 0, "broken_lines": 0, "late_writes": 0}

    def step(self) -> None:
        """One thing that engines do; a line that breaks meanwhile is given up."""
        try:
            if self._engine is None:
                self._engine = Engine(self._server)  # type: ignore[arg-type]
                self._engine.patience_s = PATIENCE_S
            self._act(self._engine)
        except (LMCacheError, OSError, ValueError):
            self.seen["broken_lines"] += 1
            self.drop()
            time.sleep(0.02)

    def _act(self, engine: Engine) -> None:
        start = self._random.randrange(NUM_PROMPTS)
        names: list[object] = [(start, number) for number in range(self._random.randint(1, PROMPT_CHUNKS))]
        chance = self._random.random()
        if chance < 0.35:
            self.seen["stored"] += engine.store(names)
        elif chance < 0.45:
            granted = engine.reserve(names)
            if granted.ticket:
                engine.write(granted, names)
                engine.call(m.Abort(0, ticket=granted.ticket))
        else:
            self._use(engine, names)

    def _use(self, engine: Engine, names: list[object]) -> None:
        found = engine.promote(names)
        self.seen["misses"] += len(names) - found.num_chunks
        failed = array("I")
        for index, (name, offset, checksum) in enumerate(
            zip(names, array("Q", found.offsets), array("Q", found.checksums), strict=False)
        ):
            data = engine.pool[offset : offset + EXTENT_BYTES]
            if engine.checksum(name, data) != checksum:
                failed.append(index)
                self.seen["rejected"] += 1
            elif data != contents(name):
                print(f"WRONG BYTES of {name} at {offset}", flush=True)
                os._exit(WRONG)
            else:
                self.seen["accepted"] += 1
        if found.lease:
            engine.call(m.Release(0, lease=found.lease, failed=failed.tobytes()))

    def cut(self) -> None:
        """Lose the attach socket in the middle of a store and a lookup, and go on as if nothing had happened."""
        engine = self._engine
        if engine is None:
            return
        with contextlib.suppress(LMCacheError, OSError, ValueError):
            names: list[object] = [("late", os.getpid(), self._random.random(), number) for number in range(4)]
            granted = engine.reserve(names)
            engine.attachment.socket.close()
            for _ in range(20):
                time.sleep(0.01)
                checksums = engine.write(granted, names)
                self.seen["late_writes"] += 1
            if granted.ticket:
                try:
                    engine.call(m.Commit(0, ticket=granted.ticket, checksums=checksums))
                except PeerRefused:
                    return
                print("A COMMIT WAS TAKEN AFTER THE DEATH OF ITS OWNER", flush=True)
                os._exit(WRONG)
        self.drop()

    def hold(self) -> None:
        """Have something that ends with us only."""
        self.drop()
        while True:
            with contextlib.suppress(LMCacheError, OSError, ValueError):
                self._engine = engine = Engine(self._server)  # type: ignore[arg-type]
                names: list[object] = [("held", os.getpid(), number) for number in range(4)]
                engine.store(names)
                engine.lookup(names)
                engine.reserve([(name, "unwritten") for name in names])
                return

    def drop(self) -> None:
        """Give the line up."""
        if self._engine is not None:
            engine, self._engine = self._engine, None
            engine.close()


def main(attach_path: str, seed: int) -> None:
    """Work, and do what is said."""
    worker = Worker(attach_path, seed)
    is_working = True
    said = b""
    os.set_blocking(0, False)
    while True:
        if is_working:
            worker.step()
        select.select([0], [], [], 0.0 if is_working else 1.0)
        with contextlib.suppress(BlockingIOError):
            part = os.read(0, 4096)
            if not part:
                return
            said += part
        while b"\n" in said:
            word, _, said = said.partition(b"\n")
            if word == b"cut":
                worker.cut()
            elif word == b"rest":
                is_working = False
                worker.drop()
                print(json.dumps(worker.seen), flush=True)
                worker.seen = dict.fromkeys(worker.seen, 0)
            elif word == b"hold":
                worker.hold()
                print("holding", flush=True)
            elif word == b"work":
                is_working = True
            elif word == b"end":
                worker.drop()
                print(json.dumps(worker.seen), flush=True)
                return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
