"""The object tier against obstore called directly, on one store, object sizes and verbs taking turns.

    python benchmarks/tier_object.py [--json PATH] [--rounds 5]

Direct means: `put_async` of the object's pieces in one PUT and `get_async` with its whole body, same settings, one call
at a time; the body stays in the library's memory. The tier copies it into the parts besides, as the cascade needs it.
Stores: an S3 server of its own (moto's, whose own speed bounds both), and a folder on tmpfs: no network, so that the
tier's copy shows. GB are 10**9 bytes. Bound, on S3: 0.8 of obstore called directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from common import Report, Row, free_port, parser, spread, stop

from lmcache.tiers import make_tier, objects
from lmcache.tiers.base import Share
from lmcache.tiers.object_store import build, site
from lmcache.tiers.options import Options

MIB = 1 << 20
SIZES_BYTES = (32 * MIB, 8 * MIB, MIB)
MOVED_BYTES = 64 * MIB  # by each of them, in each verb and round
BOUND = 0.8
START_S = 60.0
SHARE = Share(bytes(16))


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, Any]]:
    """Options of a tier in a bucket of a server of its own."""
    port = free_port()
    with open(folder / "server.log", "wb") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError):
                bucket = urllib.request.Request(f"http://127.0.0.1:{port}/benchmark", method="PUT")
                urllib.request.urlopen(bucket, timeout=START_S).close()
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError((folder / "server.log").read_text(errors="replace"))
            time.sleep(0.05)
        os.environ.update(AWS_ACCESS_KEY_ID="benchmark", AWS_SECRET_ACCESS_KEY="moto checks nothing")
        yield {"type": "object", "url": "s3://benchmark", "endpoint": f"http://127.0.0.1:{port}", "allow_http": True}
    finally:
        stop(process)


def made(num_bytes: int) -> tuple[bytes, list[memoryview]]:
    """An object of that length: a header page and one extent."""
    key = sha256(b"%d" % num_bytes).digest()
    header = objects.encode(objects.Header(key, bytes(16), bytes(16), bytes(8), num_bytes - objects.PAGE_BYTES, (0,)))
    memory = memoryview(mmap.mmap(-1, num_bytes))
    memory[:] = os.urandom(num_bytes)
    memory[: len(header)] = header
    return key, [memory[: len(header)], memory[len(header) :]]


async def seconds(calls: int, call: Callable[[], Awaitable[object]]) -> float:
    """How long a call takes, on the average."""
    start = time.perf_counter()
    for _ in range(calls):
        if not await call():
            raise RuntimeError("the tier answered False")
    return (time.perf_counter() - start) / calls


async def measure(options: dict[str, Any], rounds: int, report: Report) -> None:
    """A row for each size and verb."""
    import obstore

    direct = build(site(Options(options)))
    tier = make_tier(options)
    await tier.open()
    for num_bytes in SIZES_BYTES:
        key, parts = made(num_bytes)
        calls = max(1, MOVED_BYTES // num_bytes)
        work: dict[tuple[str, str], Callable[[], Awaitable[object]]] = {
            ("put", "obstore"): partial(obstore.put_async, direct, "direct", parts, use_multipart=False),
            ("put", "tier"): partial(tier.put, key, parts, SHARE),
            ("get", "obstore"): lambda: _body(obstore, direct),
            ("get", "tier"): partial(tier.get, key, parts),
        }
        taken: dict[tuple[str, str], list[float]] = {case: [] for case in work}
        for turn in range(rounds + 1):
            for case, call in work.items():
                taken_s = await seconds(calls, call)
                if turn:  # the first warms up
                    taken[case].append(num_bytes / taken_s / 1e9)
        before = [bytes(part) for part in parts]
        for part in parts:
            part[:] = bytes(len(part))
        if not await tier.get(key, parts) or [bytes(part) for part in parts] != before:
            raise RuntimeError("other bytes came back")
        bound = BOUND if tier.backend == "s3" else None
        for verb in ("put", "get"):
            pairs = zip(taken[verb, "tier"], taken[verb, "obstore"], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            figures = {"ours": spread(taken[verb, "tier"]), "obstore": spread(taken[verb, "obstore"])}
            title = f"object tier, {tier.backend}, {verb} {num_bytes // MIB} MiB"
            report.add(Row(title, "GB/s", figures, ratio, "ours / obstore, turn by turn", bound, at_least=True))
    await tier.close()


async def _body(obstore: Any, direct: Any) -> int:
    found = await obstore.get_async(direct, "direct")
    return len(await found.bytes_async())


def main() -> int:
    """Exit 1 when a bound is missed."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="turns of each (default 5)")
    args = options.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory() as folder, s3_server(Path(folder)) as s3:
        asyncio.run(measure(s3, args.rounds, report))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        asyncio.run(measure({"type": "object", "url": f"file://{folder}"}, args.rounds, report))
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
