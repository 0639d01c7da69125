"""What encryption at rest costs: sealing and unsealing against the bare cipher and memcpy, and a sealed file tier.

    python benchmarks/tier_sealed.py [FOLDER] [--json PATH] [--rounds 5]

One thread's time on the processor, memory that is used again, round after round in turn:

    memcpy    copies the extent
    AESGCM    cryptography's own AES-256-GCM, from one buffer into another
    seal      what a sealed tier does before a put; the object's checksums, key and header included
    unseal    what it does after a get, where the bytes lie

Then a file tier in FOLDER and the same one sealed, as many calls at a time as it likes. Ratios are medians over rounds.
"""

from __future__ import annotations

import asyncio
import mmap
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import Report, Row, parser, spread
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from tier_file import Buffers, size_of, through

from lmcache.tiers import make_tier, objects
from lmcache.tiers.objects import PAGE_BYTES, Header
from lmcache.tiers.sealed_cipher import seal, unseal
from lmcache.tiers.sealed_keys import Key

KIB, MIB, GB = 1 << 10, 1 << 20, 1 << 30
SIZES = (8 * MIB, 256 * KIB)
TURN_BYTES = 64 * MIB
ROUND_BYTES = 160 * MIB
RATIOS = {"seal": 0.8, "unseal": 0.6}  # least to the bare cipher, of the larger extents; small ones pay 10 us each
VERBS = ("put", "get")


def memory(num_bytes: int) -> memoryview:
    """Pages that exist already."""
    made = memoryview(mmap.mmap(-1, num_bytes))
    made[:] = secrets.token_bytes(PAGE_BYTES) * (num_bytes // PAGE_BYTES)
    return made


def cipher(extent_bytes: int, rounds: int) -> list[Row]:
    """Each way to touch the bytes of an object of one extent."""
    key = Key(bytes(4), secrets.token_bytes(32))
    extent, room = memory(extent_bytes), memory(PAGE_BYTES + extent_bytes)
    sealed = memory(PAGE_BYTES + extent_bytes)
    header = Header(bytes(32), bytes(16), bytes(16), bytes(8), extent_bytes, (1,))
    seal(key, header, [extent], sealed)
    closed = objects.decode(sealed)
    bare = AESGCM(key.secret)
    nonce = bytes(12)

    def open_it() -> None:
        # Decrypting turns the bytes into something else; what it costs is the same, and only the tag is wrong later.
        unseal(key, closed, [sealed[PAGE_BYTES:]])

    ways: dict[str, Callable[[], Any]] = {
        "memcpy": lambda: room.__setitem__(slice(PAGE_BYTES, None), extent),
        "AESGCM": lambda: bare.encrypt_into(nonce, extent, b"", room[: extent_bytes + 16]),
        "seal": lambda: seal(key, header, [extent], room),
        "unseal": open_it,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    repeats = TURN_BYTES // extent_bytes
    for number in range(rounds):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            way = ways[name]
            start = time.thread_time()
            for _ in range(repeats):
                way()
            times[name].append((time.thread_time() - start) / repeats)
    speeds = {name: spread([extent_bytes / value / 1e9 for value in values]) for name, values in times.items()}
    rows = []
    for name, bound in RATIOS.items():
        pairs = zip(times["AESGCM"], times[name], strict=True)
        ratio = statistics.median(bare_s / ours_s for bare_s, ours_s in pairs)
        figures = {"ours": speeds[name], "AESGCM": speeds["AESGCM"], "memcpy": speeds["memcpy"]}
        judged = bound if extent_bytes == SIZES[0] else None
        title = f"{name} {size_of(extent_bytes)}, 1 thread"
        rows.append(Row(title, "GB/s", figures, ratio, "ours / AESGCM, round by round", judged, at_least=True))
    return rows


async def file_tier(folder: Path, extent_bytes: int, rounds: int) -> list[Row]:
    """One row a verb: a file tier and a sealed one, in turn."""
    key = folder / "key"
    key.touch(0o600)
    key.write_text(secrets.token_hex(32) + "\n")
    count = ROUND_BYTES // extent_bytes
    capacity_gb = (rounds + 1) * count * (extent_bytes + PAGE_BYTES) / GB
    common = {"type": "file", "capacity_gb": capacity_gb}
    tiers = [
        make_tier({**common, "base_path": str(folder / "plain")}),
        make_tier({**common, "base_path": str(folder / "sealed"), "seal": {"key_file": str(key)}}),
    ]
    buffers = Buffers(tiers[0].concurrency, extent_bytes)
    seconds: dict[str, list[list[float]]] = {verb: [] for verb in VERBS}
    for tier in tiers:
        await tier.open()
        warm = [secrets.token_bytes(32) for _ in range(count)]
        await through(tier, buffers, warm, "fill")
        await tier.delete(warm)
    for number in range(rounds):
        keys = [secrets.token_bytes(32) for _ in range(count)]
        for verb in VERBS:
            took = [0.0, 0.0]
            for turn in (0, 1) if number % 2 else (1, 0):
                took[turn] = await through(tiers[turn], buffers, keys, "load" if verb == "get" else "fill")
            seconds[verb].append(took)
    for tier in tiers:
        await tier.close()
    gigabytes = count * buffers.object_bytes / 1e9
    return [
        Row(
            f"sealed file tier, {size_of(extent_bytes)}, {verb}, {tiers[0].concurrency} at a time",
            "GB/s",
            {
                "ours": spread([gigabytes / sealed for _, sealed in times]),
                "unsealed": spread([gigabytes / plain for plain, _ in times]),
            },
            statistics.median(plain / sealed for plain, sealed in times),
            "ours / unsealed, round by round",
        )
        for verb, times in seconds.items()
    ]


def main() -> int:
    """Exit 1 when a bound is missed."""
    options = parser(__doc__)
    options.add_argument("folder", type=Path, nargs="?", help="where to write; it must exist")
    options.add_argument("--rounds", type=int, default=5, help="alternations (default 5)")
    args = options.parse_args()
    report = Report()
    for extent_bytes in SIZES:
        for row in cipher(extent_bytes, args.rounds):
            report.add(row)
    for extent_bytes in SIZES:
        folder = Path(tempfile.mkdtemp(prefix="tier_sealed-", dir=args.folder))
        try:
            for row in asyncio.run(file_tier(folder, extent_bytes, args.rounds)):
                report.add(row)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
