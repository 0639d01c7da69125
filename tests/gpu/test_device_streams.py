"""``make_engine`` on a real GPU: a copy follows what the engine had enqueued when it was ordered."""

from __future__ import annotations

import os

import numpy as np
import torch

from lmcache.layout import TensorSpec, make_layout
from lmcache.transfer.device import DeviceEngine, make_engine
from lmcache.transfer.plan import CopyEngine, Plan
from lmcache.transfer.pool_map import PoolMap

BLOCKS, BLOCK_TOKENS, BLOCK_BYTES = 64, 16, 64 << 10
CYCLES = 200_000_000
"""How long the engine's stream is kept busy before it writes: about 0.1 s."""


def world() -> tuple[torch.Tensor, CopyEngine, PoolMap]:
    kv = torch.zeros((BLOCKS, BLOCK_BYTES), dtype=torch.uint8, device="cuda")
    spec = TensorSpec("layer", tuple(kv.shape), tuple(kv.stride()), 1, kv.data_ptr(), "uint8")
    engine = make_engine(make_layout([spec], BLOCKS, BLOCK_TOKENS), kv.device)
    fd = os.memfd_create("pool")
    os.truncate(fd, 4 * BLOCK_BYTES)
    return kv, engine, PoolMap(fd, 4 * BLOCK_BYTES)


def test_a_store_reads_what_the_forward_before_it_writes() -> None:
    kv, engine, pool = world()
    assert isinstance(engine, DeviceEngine)
    while engine.prepare(pool, pool.size_bytes, BLOCK_TOKENS):
        pass
    torch.cuda._sleep(CYCLES)
    kv.fill_(7)
    engine.store(pool, Plan.of(BLOCK_TOKENS, [5], [BLOCK_BYTES], [1], engine.mark()), 1)
    extent = np.frombuffer(pool.buffer, np.uint8)[BLOCK_BYTES : 2 * BLOCK_BYTES]
    assert (extent == 7).all()


def test_a_load_waits_for_a_forward_that_still_reads_its_blocks() -> None:
    kv, engine, pool = world()
    sums = engine.store(pool, Plan.of(BLOCK_TOKENS, [1], [0], [1], engine.mark()), 1)
    kv.fill_(9)
    torch.cuda._sleep(CYCLES)
    read_before = kv[3].clone()
    plan = Plan.of(BLOCK_TOKENS, [3], [0], [1], engine.mark())
    assert engine.retrieve(pool, plan, np.frombuffer(sums, np.uint64).tolist(), 1) == []
    assert (read_before == 9).all()
    assert (kv[3] == 0).all()
