"""How long a server needs to find a killed one's L1 again.

    python benchmarks/adoption.py [--json PATH] [--entries 262144] [--rounds 5]

A records file as a killed server leaves it: every slot holds a published chunk, in extents and in an order of
publication that are scattered, as after a long life. Timed is what a start does with it, from ``open_pool`` to a
``Cache`` that answers, each round in a new process (a start is one, with cold memory). The memory behind the pool need
not exist for this, so none is taken. Chunks of eight ranks are measured beside it, on as many records.
"""

from __future__ import annotations

import gc
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path

import common
from common import Row

from lmcache.cache.base import Limits
from lmcache.cache.evict import make_policy
from lmcache.cache.opening import SHARED_MEMORY, open_pool
from lmcache.cache.records import SLOT_POOL_BYTES
from lmcache.cache.store import Cache
from lmcache.keys import KEY_BYTES
from lmcache.system import SystemClock, SystemEntropy, SystemFiles

ENTRIES, BOUND_S = 262_144, 0.3
EXTENT_BYTES = SLOT_POOL_BYTES
CHUNK_TOKENS = 256
WORLDS = (1, 8)
NUM_ORIGINS = 8


def leave(directory: str, num_records: int, world_size: int) -> None:
    """What a killed server leaves: a pool without memory, and a published record in each slot."""
    pool, records = open_pool(directory, num_records * EXTENT_BYTES, CHUNK_TOKENS, SystemFiles())
    records.write_ready(num_records * EXTENT_BYTES)
    source = random.Random(0)
    slots, places = list(range(num_records)), list(range(num_records))
    source.shuffle(slots)
    source.shuffle(places)
    origins = [source.randbytes(40) for _ in range(NUM_ORIGINS)]
    for first in range(0, num_records, world_size):
        key, origin = source.randbytes(KEY_BYTES), source.choice(origins)
        for rank in range(world_size):
            slot, offset = slots[first + rank], places[first + rank] * EXTENT_BYTES
            checksum = source.getrandbits(64)
            records.publish(slot, key, rank, (world_size, EXTENT_BYTES), offset, checksum, origin)
    records.flush()
    pool.close(persist=True)


def take_over(directory: str, num_records: int, world_size: int) -> float:
    """Seconds of one start, in this process; checks that everything was found."""
    files, policy, clock = SystemFiles(), make_policy("LRU"), SystemClock()
    gc.collect()
    start = time.perf_counter()
    pool, records = open_pool(directory, num_records * EXTENT_BYTES, CHUNK_TOKENS, files)
    cache = Cache(pool, records, policy, clock, Limits(), entropy=SystemEntropy())
    seconds = time.perf_counter() - start
    usage = cache.usage()
    if usage.num_adopted != num_records // world_size or usage.used_bytes != num_records * EXTENT_BYTES:
        raise RuntimeError(f"only {usage.num_adopted} entries were found again")
    cache.close(persist=True)
    return seconds


def measure(folder: Path, num_records: int, world_size: int, rounds: int) -> list[float]:
    """Seconds of ``rounds`` starts on one records file."""
    directory = f"{folder}/{world_size}"
    leave(directory, num_records, world_size)
    command = [sys.executable, __file__, "--take-over", directory, str(num_records), str(world_size)]
    seconds = array("d")
    for _ in range(rounds):
        seconds.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return list(seconds)


def main() -> int:
    """Exit 1 when the bound is missed."""
    if sys.argv[1:2] == ["--take-over"]:
        print(take_over(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
        return os.EX_OK
    parser = common.parser(__doc__)
    parser.add_argument("--entries", type=int, default=ENTRIES, help="records; the bound is about the default")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    if args.rounds < 1 or args.entries < 1024 or args.entries % max(WORLDS):
        parser.error(f"--rounds is 1 or more, --entries at least 1024 and a multiple of {max(WORLDS)}")
    report = common.Report()
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
        for world_size in WORLDS:
            figures = common.spread(measure(Path(name), args.entries, world_size, args.rounds))
            bound = BOUND_S if world_size == 1 and args.entries <= ENTRIES else None
            title = f"find {args.entries:,} records of a killed server, {world_size} rank{'s'[: world_size - 1]}"
            report.add(Row(title, "s", {"ours": figures}, figures["median"], "ours, s", bound))
    return report.end(args.json)


if __name__ == "__main__":
    sys.exit(main())
